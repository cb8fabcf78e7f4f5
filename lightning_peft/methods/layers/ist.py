"""IST: train the layers that matter, as found by damping them and watching the loss.

Every ``score_period_steps`` optimizer steps, damp the response of random half-sized sets of layers and see how much the
loss suffers: layers whose damping hurts more than average gain importance. At every draw, a quarter of the layers
trains, drawn with odds that grow with importance (Yao et al. 2024, arXiv:2410.11772, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import comb
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError, EffectError, ScopeError, suggest
from lightning_peft.methods.arguments import is_fraction, is_number, is_whole
from lightning_peft.methods.base import MethodCallback, units_by_block
from lightning_peft.methods.batches import sample_batches, source_loaders
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.scoring import mean_over_ranks, scoring_loss, without_trace

__all__ = ["IST", "ScoreOn", "draw_subsets", "suppressed", "updated_importance"]

ScoreOn = Literal["batch", "train", "val"]
"""What a round scores on: the batch about to be trained on, or a batch of its own drawn from a loader's data set."""

_PATIENCE = 50
_SCORE_SAMPLES = 16  # of the authors' code


def _odds(scores: Tensor) -> Tensor:
    """Odds of being drawn, never so small that ``multinomial`` takes them for zero."""
    return torch.sigmoid(scores.double()).clamp_min(1e-30)


def draw_subsets(importance: Tensor, size: int, num_subsets: int, generator: torch.Generator) -> list[list[int]]:
    """Draw distinct sets of layers to damp, unimportant layers more often.

    Args:
        importance: Scores, shape ``(num_layers,)``.
        size: Layers in each set.
        num_subsets: Sets wanted; fewer are drawn if there are not that many.
        generator: Source of the draw.
    """
    odds = _odds(-importance)
    wanted = min(num_subsets, comb(len(importance), size))
    subsets: list[list[int]] = []
    repeats = 0
    while len(subsets) < wanted:
        drawn = sorted(torch.multinomial(odds, size, replacement=False, generator=generator).tolist())
        if drawn not in subsets:
            subsets.append(drawn)
        elif (repeats := repeats + 1) % _PATIENCE == 0:
            odds = odds.sqrt()  # scores so far apart that the same set comes again and again: even them out
    return subsets


def updated_importance(importance: Tensor, subsets: Sequence[Sequence[int]], losses: Tensor, score_lr: float) -> Tensor:
    """Return the scores after one round of damping.

    The reward of a set is ``exp(-loss)`` against the mean of all sets; the importance of its layers falls with the
    reward, scaled by the slope of the sigmoid that turns scores into odds.

    Args:
        importance: Scores before, shape ``(num_layers,)``.
        subsets: The sets that were damped.
        losses: Loss with each set damped, shape ``(num_subsets,)``.
        score_lr: Step size (the paper's mu).

    Raises:
        EffectError: If a reward is not a finite number.
    """
    rewards = torch.exp(-losses)
    if not bool(torch.isfinite(rewards).all()):
        raise EffectError(
            f"IST cannot score: with layers damped the losses are {losses.tolist()}, and their rewards exp(-loss) are "
            "not finite. The loss has to be a number above about -700, as a mean cross-entropy is."
        )
    rewards = rewards - rewards.mean()
    odds = torch.sigmoid(importance)
    slope = odds * (1 - odds) * score_lr
    updated = importance.clone()
    for subset, reward in zip(subsets, rewards, strict=True):
        updated[list(subset)] -= reward * slope[list(subset)]
    return updated


@contextmanager
def suppressed(layers: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Scale the response of ``layers`` by ``factor`` while the context lasts.

    The response of a layer with an injected adapter is what the adapter adds to the frozen layer's output. The response
    of a block is what it adds to the residual stream: its output minus its first input of the same shape, or the
    whole output if no input has that shape.
    """
    with ExitStack() as stack:
        for layer in layers:
            hook = _adapter_hook(factor) if hasattr(layer, "adapter_layer_names") else _block_hook(factor)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _block_hook(factor: float) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        main = output if isinstance(output, Tensor) else output[0]
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        stream = next((value for value in inputs if value.shape == main.shape and value.is_floating_point()), None)
        damped = main * factor if stream is None else stream + (main - stream) * factor
        return damped if isinstance(output, Tensor) else (damped, *output[1:])

    return hook


def _adapter_hook(factor: float) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        disabled, module._disable_adapters = module._disable_adapters, True
        try:
            plain = module.forward(*args, **kwargs)
        finally:
            module._disable_adapters = disabled
        if isinstance(output, Tensor):
            return plain + (output - plain) * factor
        return (plain[0] + (output[0] - plain[0]) * factor, *output[1:])  # a whole attention with an adapter

    return hook


class IST(MethodCallback):
    """Train a part of the layers at each step, drawn by importance (importance-aware sparse tuning).

    Resting layers get no weight gradients and save no inputs for them, so that a step saves activations and time in
    proportion; the optimizer's state covers all layers soon (they rotate in every step), which is why ``state`` is
    ``"keep"``. Scoring costs ``num_candidates`` forward passes every ``score_period_steps`` steps. It compares
    ``exp(-loss)``, so that a loss of order one, such as a mean cross-entropy, tells layers apart and a sum over
    hundreds of tokens does not.

    Use it over adapters, as the paper does (LoRA or a series or parallel adapter in every layer), or over whole blocks.

    Args:
        fraction: Of the layers that train at a time, in ``(0, 1]``.
        period_steps: Optimizer steps between draws of the layers that train.
        score_period_steps: Optimizer steps between rounds of scoring.
        suppress_fraction: Of the layers damped at a time in a round.
        num_candidates: Damped sets per round, each different, at least 2.
        suppression: Factor on a damped layer's response, in ``[0, 1)`` (the paper's beta).
        score_lr: Step size of the scores (the paper's mu).
        score_on: ``"batch"``: the batch about to be trained on, which costs no further data. ``"train"`` or ``"val"``:
            samples drawn for each round from the data set of the training loader or of the first validation loader, by
            index, beside the loader: neither its order nor its position changes.
        score_samples: Samples of a round with ``"train"`` or ``"val"``, over all processes together; None: 16, as in
            the authors' code. The batch about to be trained on has a size already.
        scope: What trains: ``"adapters"``, ``"blocks"``, or any scope; its layers are the blocks it lies in.
        always: What trains all the time beside it.
        state: What becomes of optimizer state of resting layers.
        seed: Seed of the draws, the same on all ranks.

    Raises:
        ConfigError: If a number is out of range. From the fit, if ``score_on`` needs a loader that the fit has not, or
            a data set that has no length.
        ScopeError: From the fit, if the scope has fewer than two layers, or a parameter outside all layers.
        EffectError: From the fit, if a damped loss is no number.

    Example:
        >>> from lightning_peft import IST
        >>> IST(fraction=0.25, scope="blocks").score_period_steps
        10

    Paper:
        K. Yao, P. Gao, L. Li, Y. Zhao, X. Wang, W. Wang, J. Zhu: Layer-wise Importance Matters: Less Memory for Better
        Performance in Parameter-efficient Fine-tuning of Large Language Models, Findings of EMNLP 2024,
        arXiv:2410.11772, Algorithm 1; constants as in the authors' code.

    Differs from the paper:
        Scores are importance: the authors' code keeps the negated value under that name. By default a round scores on
        the batch about to be trained on, averaged over all ranks; the authors draw 16 training samples, as
        ``score_on="train"`` does. The damped response is that of
        the layer's adapters taken together, for any kind of adapter.
    """

    def __init__(
        self,
        fraction: float = 0.25,
        period_steps: int = 1,
        score_period_steps: int = 10,
        suppress_fraction: float = 0.5,
        num_candidates: int = 3,
        suppression: float = 0.25,
        score_lr: float = 10.0,
        score_on: ScoreOn = "batch",
        score_samples: int | None = None,
        scope: str | list[str] = "adapters",
        always: Sequence[str] = (),
        state: StatePolicy = "keep",
        seed: int = 0,
    ) -> None:
        problems = [
            f"{name}={value!r} must be in {interval}"
            for name, value, ok, interval in (
                ("fraction", fraction, is_fraction(fraction), "(0, 1]"),
                ("period_steps", period_steps, is_whole(period_steps, least=1), "1, 2, ..."),
                ("score_period_steps", score_period_steps, is_whole(score_period_steps, least=1), "1, 2, ..."),
                (
                    "suppress_fraction",
                    suppress_fraction,
                    is_fraction(suppress_fraction) and suppress_fraction < 1,
                    "(0, 1)",
                ),
                ("num_candidates", num_candidates, is_whole(num_candidates, least=2), "2, 3, ..."),
                ("suppression", suppression, is_number(suppression) and 0 <= suppression < 1, "[0, 1)"),
                ("score_lr", score_lr, is_number(score_lr) and score_lr > 0, "(0, inf)"),
            )
            if not ok
        ]
        if score_on not in get_args(ScoreOn):
            problems.append(f"score_on={score_on!r}: {suggest(str(score_on), get_args(ScoreOn))}".removesuffix("."))
        if score_samples is not None and not is_whole(score_samples, least=1):
            problems.append(f"score_samples={score_samples!r} must be in 1, 2, ..., or None")
        elif score_samples is not None and score_on == "batch":
            problems.append(
                f"score_samples={score_samples!r} has no effect with score_on='batch', whose size is the loader's "
                "(take 'train' or 'val')"
            )
        if problems:
            raise ConfigError(f"IST: {'; '.join(problems)}.")
        super().__init__(scope=scope, always=always, redraw=int(period_steps), state=state, seed=seed)
        self.fraction = float(fraction)
        self.period_steps = int(period_steps)
        self.score_period_steps = int(score_period_steps)
        self.suppress_fraction = float(suppress_fraction)
        self.num_candidates = int(num_candidates)
        self.suppression = float(suppression)
        self.score_lr = float(score_lr)
        self.score_on: ScoreOn = score_on
        self.score_samples = None if score_samples is None else int(score_samples)
        self.importance = torch.zeros(0)

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        units = units_by_block(structure, names)
        if len(units) < 2:
            raise ScopeError(f"{self.label} has {len(units)} layer(s); importance needs at least two to compare.")
        self._layers = [_responding(structure, unit, members, units) for unit, members in units.items()]
        self.importance = torch.zeros(len(units), dtype=torch.float64)
        return units

    @override
    def select(self, draw: Draw) -> list[str]:
        count = max(1, int(self.fraction * len(self.units)))
        drawn = torch.multinomial(
            _odds(self.importance), count, replacement=False, generator=draw.generator("layers")
        ).tolist()
        names = list(self.units)
        return [names[index] for index in sorted(drawn)]

    @override
    def observe(self, moment: Moment) -> None:
        if moment.step == 0 or moment.step % self.score_period_steps:
            return
        size = max(1, int(self.suppress_fraction * len(self.units)))
        generator = draw_generator(self.seed, moment.step, "suppressed")
        subsets = draw_subsets(self.importance, size, self.num_candidates, generator)
        losses = []
        with without_trace(moment.pl_module), torch.compiler.set_stance("force_eager"), torch.no_grad():
            moment.pl_module.eval()
            batch = self._batch(moment)
            for subset in subsets:
                with suppressed([layer for index in subset for layer in self._layers[index]], self.suppression):
                    losses.append(scoring_loss(moment.trainer, moment.pl_module, batch, moment.batch_idx))
        mean = mean_over_ranks(torch.stack([loss.detach().float() for loss in losses])).cpu().double()
        self.importance = updated_importance(self.importance, subsets, mean, self.score_lr)

    def _batch(self, moment: Moment) -> Any:
        """The batch of a round: a pure function of seed and step, so that a resumed run scores on the same one."""
        if self.score_on == "batch":
            return moment.batch
        loaders = source_loaders(moment.trainer, self.score_on, "IST")
        generator = draw_generator(self.seed, moment.step, "scored samples")
        (batch,) = sample_batches(moment.trainer, loaders, 1, generator, self.score_samples or _SCORE_SAMPLES)
        return batch

    @override
    def method_state(self) -> dict[str, Any]:
        return {"importance": self.importance.clone()}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self.importance = state["importance"].clone()

    @override
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "importance": dict(zip(self.units, self.importance.tolist(), strict=False))}


def _responding(structure: Structure, unit: str, members: Sequence[str], units: Iterable[str]) -> list[nn.Module]:
    """The modules whose response stands for a unit: its adapters' layers if it is made of adapters, or its block."""
    if set(members) <= set(structure.roles["adapters"]):
        paths = [path for path, module in structure.modules.items() if hasattr(module, "adapter_layer_names")]
        layers = [structure.modules[p] for p in paths if any(name.startswith(f"{p}.") for name in members)]
        if layers:
            return layers
    if unit not in structure.modules or any(other.startswith(f"{unit}.") for other in units):
        raise ScopeError(
            f"IST cannot damp {members[0]} by itself: it belongs to no layer of its own. Take it out of the scope, or "
            "name it in always."
        )
    return [structure.modules[unit]]
