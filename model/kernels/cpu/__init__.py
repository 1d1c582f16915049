"""Kernels for CPUs: attention without blocks above the diagonal, experts, linear layers."""
