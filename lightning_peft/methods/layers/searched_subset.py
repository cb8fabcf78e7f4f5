"""SearchedSubset: train the parameters that a search has found, freeze the rest.

Which parameters are fine-tuned decides how well a model learns and how much it memorises; an outer loop of short fits
finds a subset, and this trains it (Dutt et al. 2025, arXiv:2405.19458).
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.hft import unit_of

__all__ = ["SearchedSubset"]


class SearchedSubset(MethodCallback):
    """Train exactly the given parameters, for the whole run; freeze everything else.

    Gradients and optimizer state of the subset only; back-propagation stops below its lowest member. What is frozen is
    so before the optimizer is built and DDP wraps.

    Use it with what :class:`~lightning_peft.SubsetSearch` has found, or with any subset that you know.

    Args:
        scope: What trains: names, paths, patterns or roles.
        always: What trains beside it, outside the blocks.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ScopeError: From the fit, if an entry matches nothing.

    Example:
        >>> from lightning_peft import SearchedSubset
        >>> SearchedSubset(["model.layers.3.self_attn", "model.layers.5.mlp"]).is_static
        True

    Paper:
        R. Dutt, O. Bohdal, P. Sanchez, S. A. Tsaftaris, T. Hospedales: MemControl: Mitigating Memorization in Diffusion
        Models via Automated Parameter Selection, WACV 2025, arXiv:2405.19458. The search itself is
        :meth:`lightning_peft.SubsetSearch.bilevel`.

    Differs from the paper:
        The paper searches among the parameters of a given efficient fine-tuning method in a diffusion model; here the
        subset is any.
    """

    def __init__(self, scope: str | list[str], always: Sequence[str] = (), seed: int = 0) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per module with parameters."""
        units: dict[str, list[str]] = {}
        for name in names:
            units.setdefault(unit_of(name), []).append(name)
        return {unit: tuple(members) for unit, members in units.items()}

    @override
    def select(self, draw: Draw) -> list[str]:
        return list(self.units)
