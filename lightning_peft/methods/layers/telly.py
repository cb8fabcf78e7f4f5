"""Telly: freeze the embeddings and the bottom blocks, train the rest.

The lower layers of code models keep their properties through fine-tuning, so that freezing them costs nothing
(Shi et al. 2023, "Towards Efficient Fine-Tuning of Pre-trained Code Models: An Experimental Study and Beyond").
"""

from __future__ import annotations

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback, units_by_block

__all__ = ["Telly"]


class Telly(MethodCallback):
    """Freeze the embeddings and the bottom ``num_frozen_blocks`` blocks (Telly-K), train everything above.

    Nothing below the cut is back-propagated through, saved for the backward pass or held by the optimizer: with half of
    the blocks frozen a step costs 0.67 of full fine-tuning's FLOPs. A head that is tied to the embedding freezes with
    it. Dropout in the frozen blocks stays on, as in full fine-tuning; ``eval()`` them yourself to switch it off.

    Use it for encoders and classification, where the lower layers need not change.

    Args:
        num_frozen_blocks: The paper's K. 0 freezes the embeddings only, -1 nothing (full fine-tuning).
        scope: What may train above the cut.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ConfigError: If the model has no more blocks than are to be frozen.

    Example:
        >>> from lightning_peft import Telly
        >>> Telly(num_frozen_blocks=6).num_frozen_blocks
        6

    Paper:
        E. Shi, Y. Wang, H. Zhang, L. Du, S. Han, D. Zhang, H. Sun: Towards Efficient Fine-Tuning of Pre-trained Code
        Models: An Experimental Study and Beyond, ISSTA 2023, arXiv:2304.05216.

    Differs from the paper:
        Blocks are counted over all stacks in registration order; an encoder-decoder's encoder is frozen first.
    """

    def __init__(self, num_frozen_blocks: int = 6, scope: str | list[str] = "all", seed: int = 0) -> None:
        super().__init__(scope=scope, always=(), redraw="never", state="keep", seed=seed)
        if not is_whole(num_frozen_blocks, least=-1):
            raise ConfigError(f"Telly(num_frozen_blocks={num_frozen_blocks!r}): a whole number from -1 on.")
        self.num_frozen_blocks = int(num_frozen_blocks)

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per block or module; those below the cut are left out."""
        if self.num_frozen_blocks >= len(structure.blocks):
            raise ConfigError(
                f"Telly(num_frozen_blocks={self.num_frozen_blocks}) on a model with {len(structure.blocks)} block(s) "
                f"would freeze all of them. At most {max(len(structure.blocks) - 1, 0)} here."
            )
        below: set[str] = set()
        if self.num_frozen_blocks >= 0:
            below.update(structure.roles["embeddings"])
            for block in structure.blocks[: self.num_frozen_blocks]:
                below.update(block.parameters)
        return units_by_block(structure, (name for name in names if name not in below))

    def select(self, draw: Draw) -> list[str]:
        """All units above the cut."""
        return list(self.units)
