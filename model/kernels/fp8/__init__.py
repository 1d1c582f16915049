"""Blockwise FP8: the format, and the GEMMs that read it.

    blocks      the format in plain torch: what every kernel here is checked against, and the CPU's path
    gemm        one entry a product, dense and grouped; picks the path by device
    quantize    Triton: to FP8 in tiles of 1 x 128 or blocks of 128 x 128
    grouped     Triton: dense and grouped products, forward and for weight gradients
    vendor      torch's `scaled_mm` on Hopper, and DeepGEMM where it is installed

Only `quantize` and `grouped` import Triton, and only `gemm` imports them, on a GPU.
"""
