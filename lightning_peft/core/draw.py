"""Private randomness: every draw has a generator of its own, the same on every rank and after every resume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

__all__ = ["Draw", "draw_generator"]


def draw_generator(seed: int, draw_index: int, stream: str = "") -> torch.Generator:
    """Return a fresh CPU generator for one draw.

    The generator is a pure function of its arguments: the global random state is neither read nor changed, so that
    dropout, data order and selection do not disturb each other.

    Args:
        seed: The method's seed.
        draw_index: Which draw of the schedule this is, counted from 0.
        stream: Name of an independent stream, for methods that draw several things at once.
    """
    digest = hashlib.blake2b(f"{seed}/{draw_index}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draw:
    """One draw of a schedule, handed to a method's ``select``.

    Args:
        index: Number of the draw, from 0.
        step: Optimizer steps done before it.
        epoch: Epoch it falls into.
        seed: The method's seed.
    """

    index: int
    step: int
    epoch: int
    seed: int
    _cache: dict[str, torch.Generator] = field(default_factory=dict, repr=False, compare=False)

    def generator(self, stream: str = "") -> torch.Generator:
        """Return this draw's generator of the named stream; the same object when asked again."""
        if stream not in self._cache:
            self._cache[stream] = draw_generator(self.seed, self.index, stream)
        return self._cache[stream]
