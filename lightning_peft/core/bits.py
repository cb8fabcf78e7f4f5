"""Small integers packed to their bits."""

from __future__ import annotations

import torch

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(num_codes: int, bits: int) -> int:
    """Return the bytes that ``num_codes`` codes of ``bits`` bits take, in whole groups of eight codes."""
    return -(-num_codes // 8) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes in ``[0, 2**bits)`` into bytes, eight codes in ``bits`` bytes, the first code in the lowest bits.

    Args:
        codes: Any shape; an integer tensor.
        bits: From 1 to 8.

    Returns:
        ``packed_bytes`` bytes, flat.
    """
    flat = codes.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    places = torch.arange(bits, dtype=torch.uint8, device=flat.device)
    stream = (flat[:, None] >> places) & 1
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (stream.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, num_codes: int) -> torch.Tensor:
    """Return the ``num_codes`` codes that :func:`pack` packed, as ``uint8``."""
    if bits == 8:
        return packed[:num_codes]
    if 8 % bits == 0:  # no code crosses a byte
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> places) & (2**bits - 1)).reshape(-1)[:num_codes]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> places) & 1).reshape(-1, bits)
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream * weights).sum(1, dtype=torch.uint8)[:num_codes]
