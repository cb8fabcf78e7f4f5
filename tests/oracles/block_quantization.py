"""Slow, obvious block-wise quantisation, to compare with what the libraries do.

NF4 levels: QLoRA (arXiv:2305.14314), Appendix E. FP4 levels: all values of 1 sign bit, 2 exponent bits and 1 mantissa
bit as bitsandbytes defines them, over the largest.
"""

from __future__ import annotations

import numpy as np

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
_FP4 = np.array([0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]) / 12
FP4_LEVELS = np.unique(np.concatenate([_FP4, -_FP4]))


def nearest_level(weight: np.ndarray, levels: np.ndarray, block: int) -> np.ndarray:
    """Round each block of ``block`` consecutive elements to the nearest level times its largest magnitude."""
    flat = weight.reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        scale = np.abs(part).max()
        for offset, value in enumerate(part):
            out[start + offset] = levels[np.abs(levels - value / scale).argmin()] * scale
    return out.reshape(weight.shape)


def int8_rows(weight: np.ndarray) -> np.ndarray:
    """Round each row to whole multiples of its largest magnitude over 127."""
    out = np.empty_like(weight)
    for index, row in enumerate(weight):
        scale = np.abs(row).max() / 127
        out[index] = np.round(row / scale) * scale
    return out
