"""Blockwise FP8 read off DeepSeek-V3's report (arXiv:2412.19437, Sec. 3.3): float64 numpy and loops.

E4M3 is built from its bits, a scale at a time is taken, and products are summed 128 at a time and promoted,
as the text has it. Shares nothing with `model.kernels`.
"""

import math

import numpy as np


def e4m3_numbers():
    """All finite values of E4M3: sign, 4 exponent bits of bias 7, 3 of mantissa; S.1111.111 is NaN."""
    out = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                fraction = mantissa / 8 + (exponent > 0)
                out.append(fraction * 2.0 ** (max(exponent, 1) - 7))
    return np.array(out)  # 0, 2^-9 .. 448, ascending


def to_e4m3(x):
    """Nearest E4M3 number, ties to the even mantissa, saturating at 448."""
    grid = e4m3_numbers()
    flat = np.minimum(np.abs(x.ravel()), 448.0)
    above = np.clip(np.searchsorted(grid, flat), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    down, up = flat - low, high - flat
    take_low = (down < up) | ((down == up) & ((above - 1) % 2 == 0))  # an even index has an even mantissa
    return (np.sign(x.ravel()) * np.where(take_low, low, high)).reshape(x.shape)


def quantize(x, rows, power_of_two=False):
    """(m c) to E4M3 values (m c) and scales, a tile of `rows` x 128 at a time."""
    m, c = x.shape
    values = np.zeros((m, c))
    scales = np.zeros((math.ceil(m / rows), math.ceil(c / 128)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128))
            scale = max(np.abs(x[here]).max(), 1e-12) / 448
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            values[here], scales[i, j] = to_e4m3(x[here] / scale), scale
    return values, scales, rows


def dequantize(q):
    """The matrix that values and scales stand for."""
    values, scales, rows = q
    factor = np.kron(scales, np.ones((rows, 128)))
    return values * factor[: values.shape[0], : values.shape[1]]


def multiply(a, b):
    """`a` (m c) times `b` (n c) transposed: every 128 products are summed, scaled, and added to the total."""
    (x, x_scale, x_rows), (y, y_scale, y_rows) = a, b
    total = np.zeros((x.shape[0], y.shape[0]))
    for t in range(math.ceil(x.shape[1] / 128)):
        part = slice(t * 128, (t + 1) * 128)
        partial = x[:, part] @ y[:, part].T
        left = np.repeat(x_scale[:, t], x_rows)[: x.shape[0]]
        right = np.repeat(y_scale[:, t], y_rows)[: y.shape[0]]
        total += partial * left[:, None] * right[None, :]
    return total


def linear(x, w, dy):
    """Fprop, Dgrad and Wgrad of y = x w^T in FP8, from the input (t i), weight (o i) and gradient (t o)."""
    kept, weight = quantize(x, 1, power_of_two=True), quantize(w, 128)
    values, scales, rows = weight
    y = multiply(kept, weight)
    dx = multiply(quantize(dy, 1), (values.T, scales.T, rows))
    dw = multiply(quantize(dy.T, 1), quantize(dequantize(kept).T, 1, power_of_two=True))
    return y, dx, dw
