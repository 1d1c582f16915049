"""What a GPU must show, and how the same code runs without one.

checks/               one question to a GPU each; `python3 -m tests.gpu`, `make gpu-check`
fake_cuda.py          "cuda" on a CPU, for test_fake_cuda_*.py and for the checks in small
"""
