"""Kernels for CPUs: experts for few tokens, linear layers."""
