"""How reports find the methods of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_peft.methods.base import MethodCallback

__all__ = ["find_methods"]


def find_methods(trainer: Trainer) -> list[MethodCallback]:
    """Return the method callbacks of ``trainer``, in order."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return [callback for callback in callbacks if isinstance(callback, MethodCallback)]
