"""Tensors that are cut into shards over the processes: the piece that is here, and the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["Shard", "is_sharded", "local", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which each process holds a piece (FSDP2, tensor parallel)."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the piece that this process holds, detached and without a copy; of a plain tensor all of it."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, detached. Every process must call it, in the same order: it gathers the shards."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if is_sharded(tensor) else detached


class Shard:
    """How a sharded tensor is laid out, to cut others of its shape in the same way.

    Args:
        like: The sharded tensor.
    """

    def __init__(self, like: Tensor) -> None:
        layout: Any = like
        self._mesh, self._placements = layout.device_mesh, layout.placements
        self._shape, self._stride = layout.shape, layout.stride()
        self._device = layout._local_tensor.device

    def of_local(self, piece: Tensor) -> Tensor:
        """Make a sharded tensor of this process's piece of it, on the device that the tensor lies on."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            piece.to(self._device),
            self._mesh,
            self._placements,
            run_check=False,
            shape=self._shape,
            stride=self._stride,
        )

    @staticmethod
    def of_spec(piece: Tensor, spec: Any) -> Tensor:
        """Make a sharded tensor of a piece after torch's own description of one."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            piece, spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
        )

    def of_whole(self, tensor: Tensor) -> Tensor:
        """Keep this process's piece of a tensor that every process holds whole; nothing is sent."""
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(self._device), self._mesh, self._placements, src_data_rank=None)
