"""Arithmetic below the layers: what is fast and not in the paper.

    cpu     attention in blocks, experts one at a time, linear layers for training in fp32
    fp8     the blockwise FP8 format, and the GEMMs that read it
    fused   log-probabilities of logits on a GPU

The layers of `model/` hold the paper's equations and call these; each is checked against plain code.
"""
