"""Matrix-multiplication FLOPs of a Llama training step, written out by hand.

A product of an ``(m, k)`` and a ``(k, n)`` matrix costs ``2 m k n``. Each weight matrix is used once in the forward
pass; back-propagation costs the same again for the gradient of its input (if something before it trains) and once
more for the gradient of the weight (if it trains). The two products of attention (scores, and weighted values) have
two inputs that are both activations, so that each costs twice its forward pass when anything before it trains.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama with as many key-value heads as heads, and of one batch."""

    num_layers: int
    width: int
    hidden: int
    vocabulary: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def matrix(self, name: str) -> int:
        """Forward FLOPs of one matrix of a layer."""
        return 2 * self.tokens * self.width * (self.hidden if name in ("gate", "up", "down") else self.width)

    def attention(self) -> int:
        """Forward FLOPs of scores and weighted values of one layer."""
        return 2 * (2 * self.batch * self.length * self.length * self.width)

    def head(self) -> int:
        return 2 * self.tokens * self.width * self.vocabulary

    def forward(self) -> int:
        layer = sum(self.matrix(name) for name in MATRICES) + self.attention()
        return self.num_layers * layer + self.head()

    def backward(self, trained: Collection[tuple[int, str]], embeddings: bool, norms_in: Collection[int] = ()) -> int:
        """Backward FLOPs.

        Args:
            trained: ``(layer, matrix)`` of the matrices that train. The head always does.
            embeddings: Whether the token embedding trains.
            norms_in: Layers whose first norm trains, so that even their q, k and v have an input that needs a gradient.
        """
        total = 2 * self.head()  # weight and input: something before the head always trains here
        for layer in range(self.num_layers):
            below = embeddings or any(earlier < layer for earlier, _ in trained)
            here = below or layer in norms_in
            for name in MATRICES:
                own = (layer, name) in trained
                # What must have trained for this matrix's input to need a gradient:
                if name in ("q", "k", "v"):
                    needed = here
                else:
                    order = MATRICES.index("o" if name == "o" else "gate" if name in ("gate", "up") else "down")
                    before = any((layer, m) in trained for m in MATRICES[:order])
                    needed = here or before or (layer in norms_in)
                total += self.matrix(name) * (int(own) + int(needed))
            if here or any((layer, m) in trained for m in ("q", "k", "v")):
                total += 2 * self.attention()
        return total

    def full(self) -> int:
        """Forward and backward FLOPs when everything trains."""
        every = [(layer, name) for layer in range(self.num_layers) for name in MATRICES]
        return self.forward() + self.backward(every, embeddings=True)
