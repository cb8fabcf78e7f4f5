"""Three-factor adapters by the papers' formulas, in NumPy and float64, written apart from the package.

Every function returns the whole effective weight (out, in), or the gradients of the trained values for a given gradient
of that weight. The papers' residual weights are formed here, where the package subtracts the start instead.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def lora_xs_weight(weight: Array, rank: int, R: Array, scaling: float = 1.0) -> Array:
    """W + s U_r R S_r V_r^T: the singular vectors' signs follow the largest entry of each right one."""
    U, S, Vt = np.linalg.svd(weight, full_matrices=False)
    U, S, Vt = U[:, :rank].copy(), S[:rank], Vt[:rank].copy()
    for i in range(rank):
        if Vt[i, np.argmax(np.abs(Vt[i]))] < 0:
            Vt[i], U[:, i] = -Vt[i], -U[:, i]
    return weight + scaling * U @ R @ np.diag(S) @ Vt


def nlora_weight(weight: Array, rank: int, A: Array, N: Array, B: Array, scaling: float, pinv: bool) -> Array:
    """(W - s B0 N0 A0) + s B N A."""
    block = np.array([[weight[i, j] for j in range(rank)] for i in range(rank)])
    core = np.linalg.pinv(block) if pinv else block
    residual = weight - scaling * weight[:, :rank] @ core @ weight[:rank, :]
    return residual + scaling * B @ N @ A


def pldu(weight: Array) -> tuple[Array, Array, Array, Array]:
    """P, L, D, U by Gaussian elimination with the largest pivot, row by row."""
    rows, columns = weight.shape
    size = min(rows, columns)
    work, order, lower = weight.copy(), list(range(rows)), np.zeros((rows, size))
    for k in range(size):
        pivot = k + int(np.argmax(np.abs(work[k:, k])))
        work[[k, pivot]], lower[[k, pivot]] = work[[pivot, k]], lower[[pivot, k]]
        order[k], order[pivot] = order[pivot], order[k]
        lower[k, k] = 1.0
        for i in range(k + 1, rows):
            lower[i, k] = work[i, k] / work[k, k]
            work[i] = work[i] - lower[i, k] * work[k]
    permutation = np.zeros((rows, rows))
    for position, row in enumerate(order):
        permutation[row, position] = 1.0
    diagonal = np.array([work[k, k] for k in range(size)])
    return permutation, lower, diagonal, work[:size] / diagonal[:, None]


def loldu_weight(weight: Array, rank: int, z: Array, scale: float, z0: Array, scale0: float) -> Array:
    """(W - s0 P L_r diag(z0) U_r) + s P L_r diag(z) U_r."""
    P, L, _, U = pldu(weight)
    residual = weight - scale0 * P @ L[:, :rank] @ np.diag(z0) @ U[:rank]
    return residual + scale * P @ L[:, :rank] @ np.diag(z) @ U[:rank]


def lora_sb_delta(gradient: Array, rank: int, learning_rate: float, sign: bool) -> Array:
    """The best rank r approximation of the first step of full fine-tuning."""
    step = -learning_rate * (np.sign(gradient) if sign else gradient)
    U, S, Vt = np.linalg.svd(step, full_matrices=False)
    return sum(S[i] * np.outer(U[:, i], Vt[i]) for i in range(rank))


def core_gradient(weight_gradient: Array, A: Array, B: Array, scaling: float = 1.0) -> Array:
    """dL/dR of W + s B R A, entry by entry."""
    rank = A.shape[0]
    gradient = np.zeros((rank, rank))
    for i in range(rank):
        for j in range(rank):
            gradient[i, j] = scaling * np.sum(weight_gradient * np.outer(B[:, i], A[j]))
    return gradient
