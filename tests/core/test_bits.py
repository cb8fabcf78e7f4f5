"""Packing against Python's own integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.core.bits import pack, packed_bytes, unpack


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), data=st.data())
def test_packing_is_one_long_number_and_comes_back(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=50))
    packed = pack(torch.tensor(codes), bits)
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    size = packed_bytes(len(codes), bits)
    assert bytes(packed.tolist()) == number.to_bytes(size, "little")
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_size_and_shape(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (6, 20), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == 15 * bits == packed_bytes(120, bits)
    assert torch.equal(unpack(packed, bits, 120).reshape(6, 20), codes)
