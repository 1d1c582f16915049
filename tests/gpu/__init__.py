"""What a GPU must show: every path that only it has, against the CPU; then how fast. `make gpu-check`."""
