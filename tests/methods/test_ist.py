"""IST: the scores against the paper's rule, damping against scaled weights, scoring without a trace."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, deque
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from scipy.stats import chisquare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_peft import IST
from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError, EffectError, ScopeError
from lightning_peft.methods.layers.ist import draw_subsets, suppressed, updated_importance
from lightning_peft.methods.moment import Moment
from tests.contract.harness import (
    NUM_LAYERS,
    Probe,
    TinyModule,
    assert_same_weights,
    gqa_decoder,
    loader,
    trainer,
    weights,
)
from tests.distributed.launch import launch
from tests.methods import ist_ddp_probe
from tests.models.test_examples import run as run_example
from tests.models.tiny_models import LLAMA, save_tokenizer

# ---------------------------------------------------------------------------------------------------- sets to damp

scores = st.lists(st.floats(-8, 8), min_size=2, max_size=9)


@given(scores=scores, size=st.integers(1, 8), num_subsets=st.integers(2, 5), seed=st.integers(0, 1000))
def test_sets_are_distinct_and_of_one_size(scores: list[float], size: int, num_subsets: int, seed: int) -> None:
    size = min(size, len(scores) - 1)
    subsets = draw_subsets(torch.tensor(scores), size, num_subsets, draw_generator(seed, 0))
    assert len(subsets) == min(num_subsets, math.comb(len(scores), size))
    assert len({tuple(subset) for subset in subsets}) == len(subsets)
    for subset in subsets:
        assert len(set(subset)) == size
        assert subset == sorted(subset)
        assert 0 <= subset[0] <= subset[-1] < len(scores)


def test_sets_are_uniform_while_scores_are_equal_and_favour_unimportant_layers_after() -> None:
    drawn = Counter(
        tuple(subset)
        for index in range(3000)
        for subset in draw_subsets(torch.full((5,), 0.7), 2, 1, draw_generator(0, index))
    )
    assert chisquare([drawn[pair] for pair in combinations(range(5), 2)]).pvalue > 0.001
    importance = torch.tensor([0.0, 3.0, 0.0, -3.0])
    single = Counter(draw_subsets(importance, 1, 1, draw_generator(1, index))[0][0] for index in range(4000))
    odds = [1 / (1 + math.exp(score)) for score in importance.tolist()]
    assert chisquare([single[i] for i in range(4)], [4000 * o / sum(odds) for o in odds]).pvalue > 0.001


@pytest.mark.parametrize("spread", [40.0, 1e3, 1e6])
def test_drawing_ends_however_far_apart_scores_are(spread: float) -> None:
    importance = torch.tensor([spread, spread, -spread, -spread], dtype=torch.float64)
    subsets = draw_subsets(importance, 2, 3, draw_generator(0, 0))
    assert len(subsets) == 3
    assert [2, 3] in subsets


# ---------------------------------------------------------------------------------------------------- scores


def paper_update(scores: list[float], subsets: Sequence[Sequence[int]], losses: list[float], mu: float) -> list[float]:
    """The authors' loop on plain numbers; their score is the negative of importance."""
    unimportance = [-score for score in scores]
    odds = [1 / (1 + math.exp(-score)) for score in unimportance]
    mean = sum(math.exp(-loss) for loss in losses) / len(losses)
    for subset, loss in zip(subsets, losses, strict=True):
        for layer in subset:
            unimportance[layer] += (math.exp(-loss) - mean) * odds[layer] * (1 - odds[layer]) * mu
    return [-score for score in unimportance]


@given(
    scores=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
    losses=st.lists(st.floats(0, 6), min_size=3, max_size=3),
    mu=st.floats(0.1, 20),
    seed=st.integers(0, 100),
)
def test_scores_follow_the_papers_rule(scores: list[float], losses: list[float], mu: float, seed: int) -> None:
    importance = torch.tensor(scores, dtype=torch.float64)
    subsets = draw_subsets(importance, 3, 3, draw_generator(seed, 0))
    updated = updated_importance(importance, subsets, torch.tensor(losses, dtype=torch.float64), mu)
    expected = paper_update(scores, subsets, losses, mu)
    torch.testing.assert_close(updated, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    damped = {layer for subset in subsets for layer in subset}
    for layer in set(range(6)) - damped:
        assert updated[layer] == importance[layer]
    assert torch.equal(importance, torch.tensor(scores, dtype=torch.float64))  # the argument is left alone


@given(loss=st.floats(0, 20), mu=st.floats(0.1, 100))
def test_a_constant_loss_changes_nothing(loss: float, mu: float) -> None:
    importance = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    updated = updated_importance(importance, [[0, 1], [1, 2], [2, 3]], torch.full((3,), loss, dtype=torch.float64), mu)
    torch.testing.assert_close(updated, importance, rtol=0, atol=1e-13 * mu)


@given(losses=st.lists(st.floats(0, 4), min_size=3, max_size=3), more=st.floats(0.1, 3))
def test_a_layer_whose_damping_hurts_more_gains_more(losses: list[float], more: float) -> None:
    importance, subsets = torch.zeros(4, dtype=torch.float64), [[0, 1], [1, 2], [2, 3]]
    before = updated_importance(importance, subsets, torch.tensor(losses, dtype=torch.float64), 10.0)
    losses[0] += more  # layer 0 is in this set alone
    after = updated_importance(importance, subsets, torch.tensor(losses, dtype=torch.float64), 10.0)
    assert after[0] > before[0]
    assert after[3] < before[3]


@pytest.mark.parametrize("losses", [[1.0, math.nan, 2.0], [1.0, -1e4, 2.0]])
def test_losses_that_cannot_score_are_told(losses: list[float]) -> None:
    with pytest.raises(EffectError, match="IST cannot score"):
        updated_importance(torch.zeros(4), [[0], [1], [2]], torch.tensor(losses), 10.0)


def test_the_layer_that_matters_gets_the_highest_importance() -> None:
    """The authors' simulation: of 8 layers the loss needs 3, and a little of 6."""
    importance = torch.zeros(8, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    for index in range(300):
        subsets = draw_subsets(importance, 4, 3, draw_generator(0, index))
        losses = [
            0.5 + 1.5 * (3 in s) + 0.4 * (6 in s) + 0.05 * torch.randn(1, generator=noise).item() for s in subsets
        ]
        importance = updated_importance(importance, subsets, torch.tensor(losses, dtype=torch.float64), 10.0)
    assert importance.argmax() == 3
    assert importance.topk(2).indices.tolist() == [3, 6]
    assert torch.sigmoid(importance[3]) > 0.9


# ---------------------------------------------------------------------------------------------------- damping


def adapted(kind: str) -> nn.Module:
    """A tiny Llama with adapters that already do something."""
    targets = ["q_proj", "v_proj", "down_proj"]
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False),
        "rslora": LoraConfig(
            r=4, target_modules=targets, use_rslora=True, rank_pattern={"v_proj": 2}, init_lora_weights=False
        ),
        "dora": LoraConfig(r=2, lora_alpha=8, target_modules=targets, use_dora=True, init_lora_weights=False),
        "ia3": IA3Config(target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return inject_adapter_in_model(configs[kind], gqa_decoder())


def tuner_layers(model: nn.Module, blocks: Sequence[int]) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and any(f"layers.{block}." in name for block in blocks)
    ]


def scale_response(layer: Any, factor: float) -> None:
    """Change the weights so that the layer's own forward gives ``factor`` times the adapter's response."""
    with torch.no_grad():
        if hasattr(layer, "ia3_l"):
            vector = layer.ia3_l["default"]
            vector.copy_(1 + factor * (vector - 1))
        else:
            layer.scaling["default"] *= factor


def model_loss(model: nn.Module) -> torch.Tensor:
    model.eval()
    ids = torch.randint(0, 19, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("kind", ["lora", "rslora", "ia3"])
@pytest.mark.parametrize("blocks", [[1], [0, 2, 3]])
def test_damped_adapters_equal_scaled_weights(kind: str, blocks: list[int]) -> None:
    model = adapted(kind)
    plain = model_loss(model)
    with suppressed(tuner_layers(model, blocks), 0.25):
        damped = model_loss(model)
    assert torch.equal(model_loss(model), plain)
    for layer in tuner_layers(model, blocks):
        scale_response(layer, 0.25)
    expected = model_loss(model)
    torch.testing.assert_close(damped, expected, rtol=1e-6, atol=1e-6)
    assert abs(expected - plain) > 1e-4


def test_damped_dora_by_hand() -> None:
    (layer,) = tuner_layers(adapted("dora"), [2])[:1]
    module: Any = layer
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    weight = module.base_layer.weight
    moved = weight + 4.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    magnitude = module.lora_magnitude_vector["default"].weight
    dora = (magnitude / moved.norm(dim=1)).unsqueeze(1) * moved
    expected = x @ weight.T + 0.25 * (x @ dora.T - x @ weight.T)
    module.eval()
    with suppressed([layer], 0.25):
        damped = layer(x)
    torch.testing.assert_close(damped, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), x @ dora.T, rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """A residual block whose branch has a strength of its own; ``wrapped`` returns a tuple, as many decoders do."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.strength = 1.0
        self.wrapped = wrapped

    def forward(self, mask: Any, x: torch.Tensor) -> Any:
        out = x + self.strength * torch.tanh(self.linear(self.norm(x)))
        return (out, mask) if self.wrapped else out


@pytest.mark.parametrize("factor", [0.0, 0.25])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_damped_block_scales_its_residual_branch(factor: float, wrapped: bool, by_keyword: bool) -> None:
    block = Residual(wrapped)
    x, mask = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)

    def run() -> Any:
        return block(mask=mask, x=x) if by_keyword else block(mask, x)

    with suppressed([block], factor):
        damped = run()
    block.strength = factor
    expected = run()
    if wrapped:
        assert damped[1] is mask
        damped, expected = damped[0], expected[0]
    torch.testing.assert_close(damped, expected)


def test_damped_llama_block_against_its_own_layer_output() -> None:
    model: Any = gqa_decoder().eval()
    outputs: dict[int, Any] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, index=index: outputs.__setitem__(index, (a[0], out)))
    model_loss(model)
    inside, outside = (value.clone() for value in outputs[1])
    with suppressed([model.model.layers[1]], 0.25):
        model_loss(model)
    torch.testing.assert_close(outputs[2][0], inside + 0.25 * (outside - inside))  # what the next layer is given


def test_a_module_that_changes_the_shape_is_damped_as_a_whole() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    expected = 0.5 * layer(x)
    with suppressed([layer], 0.5):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "blocks"])
def test_an_exception_takes_the_damping_off(kind: str) -> None:
    model = gqa_decoder() if kind == "blocks" else adapted(kind)
    layers = list(model.model.layers) if kind == "blocks" else tuner_layers(model, range(NUM_LAYERS))  # pyright: ignore
    plain, state = model_loss(model), weights(model)

    def breaks() -> None:
        with suppressed(layers, 0.25):
            assert not torch.equal(model_loss(model), plain)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert torch.equal(model_loss(model), plain)
    assert_same_weights(weights(model), state)
    for module in model.modules():
        assert not module._forward_hooks
        if isinstance(module, BaseTunerLayer):
            assert not module.disable_adapters


def test_an_exception_inside_an_adapter_does_not_leave_it_switched_off() -> None:
    (layer,) = tuner_layers(adapted("lora"), [0])[:1]
    module: Any = layer

    def fails(*_: Any) -> None:
        if module.disable_adapters:
            raise ZeroDivisionError

    module.base_layer.register_forward_hook(fails)
    with pytest.raises(ZeroDivisionError), suppressed([layer], 0.25):
        layer(torch.zeros(1, 8))
    assert not module.disable_adapters


# ---------------------------------------------------------------------------------------------------- training


class Adapted(TinyModule):
    def __init__(self, kind: str) -> None:
        super().__init__("gqa_decoder")
        self.model = adapted(kind)


def block_of(name: str) -> int:
    return int(name.partition("layers.")[2].partition(".")[0])


@pytest.mark.parametrize("fraction", [0.25, 0.5])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_exactly_so_many_layers_train_and_the_base_never(kind: str, fraction: float, tmp_path: Path) -> None:
    module = Adapted(kind)
    start = weights(module)
    method = IST(fraction, score_period_steps=3)
    probe = Probe([method])
    run = trainer(tmp_path, [method, probe])
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    adapters = {n for n, _ in module.named_parameters() if "lora_" in n or "ia3_" in n}
    active = []
    assert len(probe.steps) == 12
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient == step.moved
        blocks = {block_of(name) for name in step.moved}
        assert len(blocks) == int(fraction * NUM_LAYERS)
        assert step.moved == {name for name in adapters if block_of(name) in blocks}
        active.append(frozenset(blocks))
    assert len(set(active)) > 2
    moved = {name for name, value in weights(module).items() if not torch.equal(value, start[name])}
    assert moved == {name for name in adapters if block_of(name) in set().union(*active)}
    assert bool(method.importance.any())
    assert list(method.describe()["importance"].values()) == method.importance.tolist()


PAIR = {"target_modules": ["q_proj", "o_proj"]}
INJECTED: dict[str, Any] = {
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=100, **PAIR),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **PAIR),
    "c3a": lambda: peft.C3AConfig(block_size=4, **PAIR),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=8, **PAIR),
    "hra": lambda: peft.HRAConfig(r=2, **PAIR),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(r=2, **PAIR),
    "lokr": lambda: peft.LoKrConfig(r=2, **PAIR),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **PAIR),
    "randlora": lambda: peft.RandLoraConfig(r=2, **PAIR),
    "road": lambda: peft.RoadConfig(group_size=2, **PAIR),
    "shira": lambda: peft.ShiraConfig(r=2, **PAIR),
    "vera": lambda: peft.VeraConfig(r=2, **PAIR),
}


class OtherAdapters(TinyModule):
    def __init__(self, kind: str) -> None:
        super().__init__("gqa_decoder")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model: Any = peft.get_peft_model(gqa_decoder(), INJECTED[kind]())
            for parameter in self.model.parameters():
                if parameter.requires_grad:  # most kinds start at an adapter that does nothing
                    parameter.data.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", INJECTED)
def test_adapters_of_every_kind_are_scored_and_trained(kind: str, tmp_path: Path) -> None:
    module, method = OtherAdapters(kind), IST(0.5, score_period_steps=1)
    adapters = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    probe = Probe([method])
    run = trainer(tmp_path, [method, probe], max_epochs=1)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert len(method.units) == NUM_LAYERS
    assert bool(method.importance.any()), "damping does something"
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.moved
        blocks = {block_of(name) for name in step.moved}
        assert len(blocks) == NUM_LAYERS // 2
        assert step.moved == {name for name in adapters if block_of(name) in blocks}


class CountPasses(TinyModule):
    """Counts forward passes in training and in scoring, and where the run stood."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        object.__setattr__(self, "seen", Seen())

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        passes: Seen = self.seen  # pyright: ignore[reportAssignmentType]
        if self.training:
            passes.trained.append(self.trainer.global_step)
        else:
            assert not torch.is_grad_enabled()
            passes.scored.append((self.trainer.global_step, batch_idx))
        return super().training_step(batch, batch_idx)


class Seen:
    def __init__(self) -> None:
        self.trained: list[int] = []
        self.scored: list[tuple[int, int]] = []


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rounds_come_at_their_optimizer_steps(accumulate: int, tmp_path: Path) -> None:
    """Once each, with ``num_candidates`` passes on the first micro-batch; none before the first step."""
    module = CountPasses()
    method = IST(0.5, score_period_steps=3, num_candidates=4, scope="blocks")
    run = trainer(tmp_path, [method], accumulate_grad_batches=accumulate)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    seen: Any = module.seen
    rounds = range(3, run.global_step, 3)
    assert [step for step, _ in seen.scored] == [step for step in rounds for _ in range(4)]
    per_epoch = -(-11 // accumulate)
    assert [index for _, index in seen.scored] == [step % per_epoch * accumulate for step in rounds for _ in range(4)]
    assert len(seen.trained) == 22
    assert len(method.history) == run.global_step


class Recorded(IST):
    """Checks each round against the damped losses computed independently, by scaling weights."""

    rounds: int = 0

    def observe(self, moment: Moment) -> None:
        before = self.importance.clone()
        state = weights(moment.pl_module)
        super().observe(moment)
        assert_same_weights(weights(moment.pl_module), state)
        if moment.step == 0 or moment.step % self.score_period_steps:
            assert torch.equal(self.importance, before)
            return
        subsets = draw_subsets(before, 2, 3, draw_generator(self.seed, moment.step, "suppressed"))
        model: Any = moment.pl_module.model
        losses = []
        for subset in subsets:
            layers = tuner_layers(model, subset)
            for layer in layers:
                scale_response(layer, 0.25)
            model.eval()
            with torch.no_grad():
                losses.append(moment.pl_module.loss(moment.batch).item())  # pyright: ignore[reportCallIssue]
            for layer in layers:
                scale_response(layer, 4.0)  # powers of two: exact
        model.train()
        expected = paper_update(before.tolist(), subsets, losses, self.score_lr)
        torch.testing.assert_close(self.importance, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)
        damped = {layer for subset in subsets for layer in subset}
        assert {i for i in range(NUM_LAYERS) if self.importance[i] != before[i]} <= damped
        assert bool((self.importance != before).any())
        self.rounds += 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scores_of_a_run_against_scaled_weights(accumulate: int, tmp_path: Path) -> None:
    method = Recorded(0.5, score_period_steps=2)
    run = trainer(tmp_path, [method], accumulate_grad_batches=accumulate)
    run.fit(Adapted("lora"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert method.rounds == (run.global_step - 1) // 2


class Branch(nn.Module):
    """``x + strength * x``, with weights to train."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        for layer, scale in ((self.up, strength), (self.down, 1.0)):
            nn.init.zeros_(layer.bias)
            nn.init.eye_(layer.weight)
            layer.weight.data.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


class Planted(pl.LightningModule):
    """Six blocks of which the third does what the target asks for; a learning rate of next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Branch(1.0 if index == 2 else 0.01) for index in range(6)])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0]
        for block in self.blocks:
            x = block(x)
        return (x - 2 * batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def test_the_block_that_matters_trains_most(tmp_path: Path) -> None:
    method = IST(0.2, score_period_steps=1, scope="blocks")
    data = DataLoader(TensorDataset(torch.randn(150, 4, generator=torch.Generator().manual_seed(0))), batch_size=1)
    trainer(tmp_path, [method], max_epochs=1, accumulate_grad_batches=1).fit(Planted(), data)
    assert method.importance.argmax() == 2
    drawn = Counter(int(name.split(".")[1]) for _, names in method.history[75:] for name in {n[:8] for n in names})
    assert drawn.most_common(1)[0][0] == 2
    assert drawn[2] > 1.5 * sorted(drawn.values())[-2]


# ---------------------------------------------------------------------------------------------------- no trace


class Rich(pl.LightningModule):
    """Everything that a scoring pass could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU()) for _ in range(4)]
        )
        self.blocks[3].eval()  # the user's own choice
        self.head = nn.Linear(8, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.mean = MeanMetric()
        self.register_buffer("steps", torch.zeros(()))
        self.outputs: list[torch.Tensor] = []
        self.recent: deque[int] = deque(maxlen=5)
        self.totals = {"samples": 0}
        self.count = 0
        self.average = torch.zeros(())

    def on_train_epoch_start(self) -> None:
        self.blocks[3].eval()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        y = batch.pop("y")  # takes its batch apart
        x = batch["x"].add_(random.random() + float(np.random.rand()) + torch.rand(()))
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        logits = self.head(h)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy, "mean": self.mean}, on_epoch=True)
        assert isinstance(self.steps, torch.Tensor)
        self.steps += 1
        self.outputs.append(loss.detach())
        self.recent.append(len(y))
        self.totals["samples"] += len(y)
        self.count += 1
        self.average += loss.detach()
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Quiet(IST):
    """Draws like IST with scores that never change."""

    def observe(self, moment: Moment) -> None:
        pass


class Ignoring(IST):
    """Scores, and then forgets the result."""

    rounds = 0

    def observe(self, moment: Moment) -> None:
        before = self.importance.clone()
        parameters = list(moment.pl_module.parameters())
        gradients = [p.grad for p in parameters]
        batch = {key: value.clone() for key, value in moment.batch.items()}
        super().observe(moment)
        self.rounds += not torch.equal(before, self.importance)
        self.importance = before
        assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
        assert moment.batch.keys() == batch.keys()
        assert all(torch.equal(moment.batch[key], batch[key]) for key in batch)


class Log(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(
            {
                "logged": {key: value.item() for key, value in trainer.callback_metrics.items()},
                "flags": [module.training for module in pl_module.modules()],
                "batch": batch["x"].tolist(),
                "metric": [float(pl_module.accuracy.compute()), float(pl_module.mean.compute())],
                "attributes": [list(pl_module.recent), dict(pl_module.totals), pl_module.count, len(pl_module.outputs)],
                "average": float(pl_module.average),
                "random": [random.getstate()[1][:3], np.random.get_state()[1][:3].tolist()],  # pyright: ignore
            }
        )


class Dicts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        noise = 0.1 * torch.rand(()) + 0.1 * random.random()  # augmentation from the global random states
        return {"x": torch.randn(6, generator=generator) + noise, "y": torch.tensor(index % 3)}


@pytest.mark.filterwarnings("ignore:Found 5 module")
@pytest.mark.parametrize("score_on", ["batch", "train", "val"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_scoring_leaves_no_trace(accumulate: int, score_on: Any, tmp_path: Path) -> None:
    results = []
    for cls in (Quiet, Ignoring):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        module, log = Rich(), Log()
        method = cls(0.5, score_period_steps=1, score_on=score_on, scope="blocks", always=("embeddings", "head"))
        run = trainer(tmp_path, [method, log], accumulate_grad_batches=accumulate)
        run.fit(module, DataLoader(Dicts(), batch_size=4, shuffle=True), DataLoader(Dicts(), batch_size=4))
        state = run.optimizers[0].state_dict()["state"]
        results.append((weights(module), log.rows, state, method.history, torch.get_rng_state()))
        if isinstance(method, Ignoring):
            assert method.rounds >= run.global_step - 2
    without, scored = results
    assert_same_weights(without[0], scored[0])
    assert without[1] == scored[1]
    assert without[3] == scored[3]
    assert torch.equal(without[4], scored[4])
    assert without[2].keys() == scored[2].keys() != set()
    for index, state in without[2].items():
        assert all(torch.equal(value, scored[2][index][key]) for key, value in state.items())
    assert len({str(row["batch"]) for row in without[1]}) == 12


@pytest.mark.filterwarnings("ignore:Found 5 module")
def test_an_exception_while_scoring_leaves_no_trace_either(tmp_path: Path) -> None:
    class Breaks(Rich):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if not self.training:
                raise RuntimeError("stop in scoring")
            return loss

    module = Breaks()
    states: list[Any] = []

    class Before(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            states.append((weights(pl_module), [m.training for m in pl_module.modules()], pl_module.count))

    method = IST(0.5, score_period_steps=1, scope="blocks")
    run = trainer(tmp_path, [method, Before()], accumulate_grad_batches=1)
    with pytest.raises(RuntimeError, match="stop in scoring"):
        run.fit(module, DataLoader(Dicts(), batch_size=4), DataLoader(Dicts(), batch_size=4))
    assert len(states) == 1
    assert_same_weights(weights(module), states[0][0])
    assert module.count == states[0][2] == 1
    assert not any(module._forward_hooks for module in module.modules())
    assert all(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------------------------------------- resume, processes


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.directory / f"{len(self.paths):03d}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)


@pytest.mark.parametrize(("score_on", "score_samples"), [("batch", None), ("train", 5), ("val", None)])
def test_scores_are_in_the_checkpoint_and_resume_exactly(score_on: Any, score_samples: Any, tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, ckpt: Path | None = None) -> tuple[Any, ...]:
        torch.manual_seed(5 if ckpt is None else 77)
        module = Adapted("dora")
        method = IST(0.5, score_period_steps=2, score_on=score_on, score_samples=score_samples)
        run = trainer(tmp_path, [method, *callbacks])
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
        return weights(module), method.importance, method.history

    saver = SaveEveryBatch(tmp_path)
    expected = fit(saver)
    (saved,) = (
        value for key, value in torch.load(saver.paths[-1], weights_only=True)["callbacks"].items() if "IST" in key
    )
    assert torch.equal(saved["method_state"]["importance"], expected[1])
    for path in saver.paths[::3]:
        result = fit(ckpt=path)
        assert_same_weights(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
        assert result[2] == expected[2]


@pytest.mark.distributed
def test_two_processes_hold_the_same_scores(tmp_path: Path) -> None:
    """Each rank has its own data; the scores are those of one process on the joined batch."""
    launch(Path(ist_ddp_probe.__file__), str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for score_on, left in ranks[0].items():
        right, single = ranks[1][score_on], ist_ddp_probe.fit(tmp_path, score_on)
        assert left["batches"] != right["batches"]
        assert torch.equal(left["importance"], right["importance"])
        assert bool(left["importance"].any())
        assert left["history"] == right["history"] == single["history"]
        torch.testing.assert_close(left["importance"], single["importance"], rtol=0, atol=1e-4)
        assert_same_weights(left["weights"], right["weights"])
    assert not torch.equal(ranks[0]["batch"]["importance"], ranks[0]["train"]["importance"])


class Samples(TinyModule):
    """Notes the samples of every scoring pass."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        object.__setattr__(self, "seen", Rows())

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if not self.training:
            seen: Rows = self.seen  # pyright: ignore[reportAssignmentType]
            seen.rounds.setdefault(self.trainer.global_step, []).append([tuple(row) for row in batch[0].tolist()])
        return super().training_step(batch, batch_idx)


class Rows:
    def __init__(self) -> None:
        self.rounds: dict[int, list[list[Any]]] = {}


@pytest.mark.parametrize(
    ("score_on", "score_samples", "count"), [("train", 3, 3), ("val", None, 16), ("train", 99, 22)]
)
def test_scoring_on_samples_of_its_own(score_on: Any, score_samples: int | None, count: int, tmp_path: Path) -> None:
    """So many, of the right data set, the same for all candidates of a round, others in the next."""
    held_out = TensorDataset((torch.arange(140) * torch.arange(140) // 3 % 19).reshape(20, 7), torch.zeros(20))
    train, val = loader("gqa_decoder"), DataLoader(held_out, batch_size=2)
    module = Samples()
    method = IST(0.5, score_period_steps=2, scope="blocks", score_on=score_on, score_samples=score_samples)
    # The first validation comes after the first round: the loader is made for scoring.
    run = trainer(tmp_path, [method], accumulate_grad_batches=1, check_val_every_n_epoch=2)
    run.fit(module, train, val)
    source: Any = train.dataset if score_on == "train" else val.dataset
    allowed = {tuple(row) for row in source.tensors[0].tolist()}
    rounds: Any = module.seen.rounds  # pyright: ignore[reportAttributeAccessIssue]
    assert list(rounds) == list(range(2, run.global_step, 2))
    for passes in rounds.values():
        assert len(passes) == 3
        assert passes[0] == passes[1] == passes[2]
        assert len(passes[0]) == len(set(passes[0])) == count
        assert set(passes[0]) <= allowed
    assert len({tuple(passes[0]) for passes in rounds.values()}) == len(rounds)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(7, dtype=torch.long), torch.tensor(0)


def test_sources_that_cannot_be_sampled(tmp_path: Path) -> None:
    train, val = loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    module, endless = TinyModule("gqa_decoder"), DataLoader(Endless(), batch_size=2)
    method = IST(scope="blocks", score_period_steps=1, score_on="val")
    run = trainer(tmp_path, [method], limit_val_batches=0, max_steps=3)
    with pytest.raises(ConfigError, match=r"IST\(score_on='val'\) needs held-out data.*score_on='train'"):
        run.fit(module, train, val)
    method = IST(scope="blocks", score_period_steps=1, score_on="train")
    run = trainer(tmp_path, [method], val_check_interval=50, max_steps=3)
    with pytest.raises(ConfigError, match="data set with a length"):
        run.fit(module, endless, val)


def save_llama(folder: Path) -> None:
    """A tiny model and tokenizer, as a user has them."""
    values = dict(LLAMA)
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)


def test_example_learns_to_count_and_writes_the_adapters(tmp_path: Path) -> None:
    out = run_example("ist_over_lora.py", cwd=tmp_path)
    (loss,) = re.findall(r"^loss: ([\d.]+)$", out, flags=re.MULTILINE)
    assert float(loss) < 1.0  # log(32) = 3.5 at the start
    importance = re.findall(r"^model\.model\.layers\.\d: ([+-][\d.]+)$", out, flags=re.MULTILINE)
    assert len(importance) == 8
    assert len(set(importance)) > 4
    saved = load_file(tmp_path / "adapters.safetensors")
    assert len(saved) == 8 * 7 * 2
    assert all("lora_" in name for name in saved)


def test_example_on_a_given_model(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "my.txt").write_text(" ".join(f"w{i % 24}" for i in range(2000)))
    out = run_example("ist_over_lora.py", "--model=model", "--text=my.txt", "--steps=40", cwd=tmp_path)
    assert float(re.findall(r"^loss: ([\d.]+)$", out, flags=re.MULTILINE)[0]) < 3.3
    assert (tmp_path / "adapters.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"fraction=0 .*suppress_fraction=1.0.*num_candidates=1.*suppression=1"):
        IST(fraction=0, suppress_fraction=1.0, num_candidates=1, suppression=1)
    for argument, value in [
        ("period_steps", "epoch"),
        ("score_period_steps", 0),
        ("score_lr", math.nan),
        ("fraction", "half"),
        ("score_on", "validation"),
        ("score_samples", 0),
        ("score_samples", 4),  # on the batch about to be trained on
    ]:
        with pytest.raises(ConfigError, match=argument):
            IST(**{argument: value})


def fit_scope(tmp_path: Path, scope: Any, module: pl.LightningModule | None = None) -> None:
    run = trainer(tmp_path, [IST(scope=scope)], limit_train_batches=1, max_epochs=1, accumulate_grad_batches=1)
    run.fit(module or TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))


def test_scopes_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match="adapters"):
        fit_scope(tmp_path, "adapters")  # the model has none
    with pytest.raises(ScopeError, match=r"has 1 layer\(s\)"):
        fit_scope(tmp_path, "model.model.layers.1")

    class Loose(TinyModule):
        def __init__(self) -> None:
            super().__init__("gqa_decoder")
            self.model.register_parameter("temperature", nn.Parameter(torch.ones(1)))

        def loss(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            return super().loss(batch) * self.model.temperature  # pyright: ignore[reportOperatorIssue]

    with pytest.raises(ScopeError, match=r"cannot damp model.temperature by itself"):
        fit_scope(tmp_path, ["blocks", "model.temperature"], Loose())


@pytest.mark.filterwarnings("ignore:.*validation_step")
def test_manual_optimisation_cannot_be_scored(tmp_path: Path) -> None:
    class Manual(Planted):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # pyright: ignore
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=1)
    method = IST(score_period_steps=2, scope="blocks")
    run = trainer(
        tmp_path, [method], gradient_clip_val=None, accumulate_grad_batches=1, max_epochs=1, limit_val_batches=0
    )
    with pytest.raises(ConfigError, match="manual optimisation"):
        run.fit(Manual(), data)
