"""LastLayer: train the last block only.

The lightweight preset of personalised code models (Zlotchevski et al. 2022, arXiv:2208.13928).
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback, units_by_block

__all__ = ["LastLayer"]


class LastLayer(MethodCallback):
    """Train the last ``num_layers`` blocks; freeze the rest.

    Back-propagation stops below them, and no activation under them is saved: with 2 of 8 blocks (and a small head) a
    step costs 0.52 of full fine-tuning's FLOPs.

    Use it where compute is scarcest, and as the cheapest baseline there is.

    Args:
        num_layers: How many blocks from the end, at least 1.
        scope: Which blocks they are the last of; for an encoder-decoder the decoder's are.
        always: What trains beside them, for example ``("head", "norms")`` for a new classifier.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ConfigError: If ``num_layers`` is less than 1 or more than there are blocks.

    Example:
        >>> from lightning_peft import LastLayer
        >>> LastLayer(num_layers=2).num_layers
        2

    Paper:
        A. Zlotchevski, D. Drain, A. Svyatkovskiy, C. Clement, N. Sundaresan, M. Tufano: Exploring and Evaluating
        Personalized Models for Code Generation, ESEC/FSE 2022, arXiv:2208.13928 (the variant that tunes the last
        decoder block).

    Differs from the paper:
        Any number of last blocks, of any model; the paper trains one, of the decoder.
    """

    def __init__(
        self,
        num_layers: int = 1,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        if not is_whole(num_layers, least=1):
            raise ConfigError(f"LastLayer(num_layers={num_layers!r}): a whole number from 1 on.")
        self.num_layers = int(num_layers)

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per block, the last ones only."""
        units = units_by_block(structure, names)
        if self.num_layers > len(units):
            raise ConfigError(f"LastLayer(num_layers={self.num_layers}): the scope has {len(units)} block(s).")
        return dict(list(units.items())[-self.num_layers :])

    def select(self, draw: Draw) -> list[str]:
        """The last blocks."""
        return list(self.units)
