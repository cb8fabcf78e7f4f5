"""The linear layer of GPT-2, sliced."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from lightning_peft.methods.slices.layer import SlicedLayer

__all__ = ["SlicedConv1D"]


class SlicedConv1D(SlicedLayer, Conv1D):
    """A ``Conv1D``, whose weight has shape (in, out), of which a part trains."""

    plain_class = Conv1D
    input_dim = 0
