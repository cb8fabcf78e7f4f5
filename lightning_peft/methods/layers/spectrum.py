"""Spectrum: train the matrices with the highest signal-to-noise ratio of each kind.

Singular values of a weight matrix above the edge that pure noise would have are signal, the others noise. Of each kind
of module (all query projections, all down projections, ...) the share with the highest ratio trains (Hartford et al.
2024, arXiv:2406.06623).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.sharded import is_sharded, whole
from lightning_peft.errors import ConfigError, ResumeMismatch, ScopeError, suggest
from lightning_peft.methods.arguments import is_fraction
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.hft import unit_of

__all__ = ["Spectrum", "Threshold", "marchenko_pastur_median", "noise_threshold", "signal_to_noise", "top_per_kind"]

Threshold = Literal["marchenko_pastur", "reference"]
"""Where noise ends: at the Marchenko-Pastur edge of the matrix, or where the authors' public code puts it."""


@lru_cache(maxsize=1024)
def marchenko_pastur_median(aspect: float) -> float:
    """Return the median of the Marchenko-Pastur law of unit variance.

    Args:
        aspect: Short side over long side of the matrix, in ``(0, 1]``.
    """
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    # With t = middle - radius * cos(angle) the density has no singularity left, not even at aspect 1.
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    t = (low + high) / 2 - (high - low) / 2 * torch.cos(angle)
    density = torch.sin(angle) ** 2 / t
    if low == 0:
        density[0] = density[1]  # 0 / 0; the limit is finite
    mass = torch.cumulative_trapezoid(density, angle)
    index = int(torch.searchsorted(mass, mass[-1] / 2))
    before = mass[index - 1]
    share = (mass[-1] / 2 - before) / (mass[index] - before)
    return float(t[index] + share * (t[index + 1] - t[index]))


def noise_threshold(singular_values: Tensor, shape: tuple[int, int], kind: Threshold) -> float:
    """Return the singular value above which a matrix has signal.

    ``"marchenko_pastur"``: the largest singular value of a noise matrix of this shape, ``sigma * (sqrt(n) + sqrt(m))``,
    with the noise's scale ``sigma`` estimated from the median singular value. ``"reference"``: ``IQR / 1.349 * (1 +
    sqrt(short / long))`` of the singular values themselves, as in the authors' code.

    Args:
        singular_values: All of them.
        shape: Rows and columns.
        kind: Which threshold.
    """
    short, long = min(shape), max(shape)
    if kind == "marchenko_pastur":
        sigma = float(singular_values.median()) / math.sqrt(long * marchenko_pastur_median(short / long))
        return sigma * (math.sqrt(short) + math.sqrt(long))
    low, high = torch.quantile(singular_values, torch.tensor([0.25, 0.75], dtype=singular_values.dtype))
    return float(high - low) / 1.349 * (1 + math.sqrt(short / long))


def signal_to_noise(matrix: Tensor, kind: Threshold) -> float:
    """Return the score of a matrix: the sum of its singular values above the threshold over that of the others.

    Under ``"reference"`` it is divided by the largest singular value, as in the authors' code; it then depends on the
    matrix's scale. Infinite without noise, 0 without signal.

    Args:
        matrix: Of any floating-point type; decomposed in single precision.
        kind: Which threshold.

    Shapes:
        ``(rows, columns)``, or ``(number, rows, columns)`` for the mean over several matrices.
    """
    if matrix.ndim == 3:
        return sum(signal_to_noise(part, kind) for part in matrix) / len(matrix)
    values = torch.linalg.svdvals(matrix.detach().float()).cpu().double()
    largest = float(values.max())
    if largest == 0:
        return 0.0
    above = values > noise_threshold(values, (matrix.shape[0], matrix.shape[1]), kind)
    signal, noise = float(values[above].sum()), float(values[~above].sum())
    ratio = signal / noise if noise > 0 else math.inf
    return ratio / largest if kind == "reference" else ratio


def top_per_kind(scores: Mapping[str, float], kinds: Mapping[str, str], fraction: float) -> list[str]:
    """Choose ``floor(fraction * members)`` of each kind, highest scores first, equal ones in the given order.

    Args:
        scores: Unit -> score, never NaN.
        kinds: Unit -> its kind.
        fraction: In ``(0, 1]``.
    """
    members: dict[str, list[str]] = {}
    for unit in scores:
        members.setdefault(kinds[unit], []).append(unit)
    chosen: set[str] = set()
    for units in members.values():
        ranked = sorted(units, key=lambda unit: -scores[unit])  # stable
        chosen.update(ranked[: math.floor(Fraction(str(fraction)) * len(units))])
    return [unit for unit in scores if unit in chosen]


class Spectrum(MethodCallback):
    """Train the matrices with the highest signal-to-noise ratio, a fixed share of each kind; freeze the others.

    The choice is made once, from the weights alone, before the fit: one singular value decomposition per matrix, shared
    out among the ranks, on the Trainer's device. Then what is frozen has no gradients and no optimizer state. With the
    embeddings on, back-propagation passes through all blocks.

    Use it for continued pretraining or instruction tuning of large decoders when full fine-tuning does not fit.

    Args:
        top_fraction: Of the matrices of each kind, in ``(0, 1]``, rounded down. A kind is a place in a block, such as
            ``self_attn.q_proj``, over all blocks of one stack.
        threshold: What counts as signal: ``"marchenko_pastur"``, values above the edge of a noise matrix, or
            ``"reference"``, what the authors' code does (see below).
        scope: What is ranked: the matrices of it, each with its bias. Tensors of one dimension (norms, and biases
            without a matrix) have no spectrum and stay frozen; name them in ``always`` to train them.
        always: What trains beside them, outside the blocks.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ConfigError: If an argument is out of range, a weight is not finite, or no kind has enough matrices.
        ScopeError: From the fit, if the scope has no matrix.

    Example:
        >>> import torch
        >>> from lightning_peft.methods.layers.spectrum import signal_to_noise
        >>> noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        >>> signal_to_noise(noise, "marchenko_pastur") < 0.1
        True
        >>> signal_to_noise(noise, "reference")
        inf

    Paper:
        E. Hartford, L. Atkins, F. Fernandes Neto, D. Golchinfar: Spectrum: Targeted Training on Signal to Noise Ratio,
        2024, arXiv:2406.06623.

    Differs from the paper:
        The authors' code estimates the noise from the spread of the singular values themselves, which is no
        Marchenko-Pastur edge: it calls noise signal, all of it for a matrix much wider than high, whose score is then
        infinite, and the score falls when a matrix is scaled up. That is ``"reference"``. The default is the edge
        that the paper names, and a score without scale. The authors' lists also hold the norms of the first half of
        the layers, an artefact of a spectrum of one value; norms stay frozen here.
    """

    def __init__(
        self,
        top_fraction: float = 0.5,
        threshold: Threshold = "marchenko_pastur",
        scope: str | list[str] = "blocks",
        always: Sequence[str] = ("embeddings", "head"),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        if not is_fraction(top_fraction):
            raise ConfigError(f"Spectrum(top_fraction={top_fraction!r}): the share that trains must be in (0, 1].")
        if threshold not in get_args(Threshold):
            raise ConfigError(
                f"Spectrum(threshold={threshold!r}): no such one. {suggest(str(threshold), get_args(Threshold))}"
            )
        self.top_fraction = float(top_fraction)
        self.threshold: Threshold = threshold
        self._device = torch.device("cpu")
        self._scores: dict[str, float] = {}
        self._kinds: dict[str, str] = {}

    @property
    def scores(self) -> dict[str, float]:
        """Unit -> score, once a fit has begun."""
        return dict(self._scores)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._device = trainer.strategy.root_device
            if trainer.global_step == 0:  # otherwise the Trainer goes on, and so does the choice
                self._scores = {}
        super().setup(trainer, pl_module, stage)

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per matrix, with its bias."""
        collected: dict[str, list[str]] = {}
        for name in names:
            collected.setdefault(unit_of(name), []).append(name)
        units = {
            unit: tuple(members)
            for unit, members in collected.items()
            if any(structure.parameters[name].ndim >= 2 for name in members)
        }
        if not units:
            raise ScopeError(f"{self.label} has no matrix, only tensors of one dimension, which have no spectrum.")
        block_of = structure.block_of()
        self._kinds = {unit: unit for unit in units}
        for unit, members in units.items():
            block = block_of.get(members[0])
            if block is not None:
                inside = unit.removeprefix(block.name).lstrip(".")
                self._kinds[unit] = f"{block.stack}|{inside}"
        loaded = (self._loaded or {}).get("method_state", {}).get("scores", {})
        if loaded.keys() == units.keys():  # a resumed run keeps its choice, whatever the weights are by now
            self._scores = dict(loaded)
        if self._scores.keys() != units.keys():
            self._scores = self._score(structure, units)
        return units

    @override
    def select(self, draw: Draw) -> list[str]:
        chosen = top_per_kind(self._scores, self._kinds, self.top_fraction)
        if not chosen:
            largest = max(list(self._kinds.values()).count(kind) for kind in self._kinds.values())
            raise ConfigError(
                f"Spectrum(top_fraction={self.top_fraction}) rounds down to no matrix at all: the largest kind has "
                f"{largest} member(s). Take {math.ceil(1000 / largest) / 1000} or more."
            )
        return chosen

    def _score(self, structure: Structure, units: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        together = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        problems: list[str] = []
        mine: dict[str, float] = {}
        for number, unit in enumerate(units):
            found = []
            is_mine = number % world_size == rank
            for name in units[unit]:
                parameter = structure.parameters[name]
                if parameter.ndim < 2 or not (is_mine or is_sharded(parameter)):
                    continue
                if parameter.is_meta:
                    problems.append(f"{name} has no values yet (it is on the meta device)")
                    continue
                weight = whole(parameter)  # of a sharded one every rank must ask for it
                if not is_mine:
                    continue
                if not bool(weight.isfinite().all()):
                    problems.append(f"{name} has values that are not finite")
                else:
                    owner = structure.modules.get(name.rpartition(".")[0])
                    found.append(signal_to_noise(_as_matrix(weight, owner).to(self._device), self.threshold))
            if is_mine:
                mine[unit] = sum(found) / len(found) if found else 0.0
        parts: list[Any] = [(mine, problems)]
        if together:
            parts = [None] * world_size
            dist.all_gather_object(parts, (mine, problems))
        problems = [problem for _, part in parts for problem in part]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ConfigError(f"Spectrum cannot rank: {'; '.join(problems[:3])}{more}.")
        everything = {unit: score for part, _ in parts for unit, score in part.items()}
        scores = {unit: everything[unit] for unit in units}
        self._warn_of_ties(scores)
        return scores

    def _warn_of_ties(self, scores: Mapping[str, float]) -> None:
        tied = []
        for kind in dict.fromkeys(self._kinds.values()):
            members = [unit for unit in scores if self._kinds[unit] == kind]
            infinite = sum(math.isinf(scores[unit]) for unit in members)
            if infinite > self.top_fraction * len(members) and infinite > 1 and self.top_fraction < 1:
                tied.append(kind.partition("|")[2] or kind)
        if tied:
            advice = " threshold='marchenko_pastur' tells them apart." if self.threshold == "reference" else ""
            rank_zero_warn(
                f"Spectrum: more matrices have an infinite score than are to be chosen, of {', '.join(tied[:4])}"
                f"{f' and {len(tied) - 4} more kinds' if len(tied) > 4 else ''}; the first of them are taken.{advice}"
            )

    @override
    def method_state(self) -> dict[str, Any]:
        return {"scores": dict(self._scores)}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        before = top_per_kind(self._scores, self._kinds, self.top_fraction)
        if top_per_kind(state["scores"], self._kinds, self.top_fraction) != before:
            raise ResumeMismatch(
                "Spectrum: the weights this run started from choose other matrices than the checkpoint's run. Load the "
                "same pretrained weights before resuming."
            )
        self._scores = dict(state["scores"])

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with the score of each matrix."""
        return {**super().describe(), "scores": dict(self._scores)}


def _as_matrix(parameter: Tensor, owner: nn.Module | None) -> Tensor:
    """A convolution's kernel as (out, all inputs); fused experts as a stack of matrices."""
    weight = parameter.detach()
    if weight.ndim == 2:
        return weight
    if weight.ndim > 3 or isinstance(owner, nn.modules.conv._ConvNd):
        return weight.flatten(1)
    return weight
