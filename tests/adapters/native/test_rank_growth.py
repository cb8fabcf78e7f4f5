from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from lightning_peft import IST, IncreLoRA, TriAdaptLoRA
from lightning_peft.adapters.native import IncreLoRAConfig, TriAdaptLoRAConfig
from lightning_peft.adapters.native.growth import GrowingLayer
from lightning_peft.adapters.native.triadapt_lora import num_growing
from lightning_peft.errors import ConfigError, PlanConflict
from tests.adapters.native.life import resume
from tests.adapters.native.models import batch, build, output
from tests.adapters.native.test_in_training import Module, loader
from tests.contract.harness import assert_same_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
METHODS: dict[str, Any] = {
    "increlora": lambda **kw: IncreLoRA(**{"target_rank": 2, "period_steps": 2, "layers_per_growth": 3, **kw}),
    "triadapt_lora": lambda **kw: TriAdaptLoRA(**{"target_rank": 2, "period_steps": 2, "total_steps": 12, **kw}),
}
CONFIGS: dict[str, Any] = {"increlora": IncreLoRAConfig, "triadapt_lora": TriAdaptLoRAConfig}
BOTH = pytest.mark.parametrize("method", METHODS)


def run(
    callbacks: list[Any],
    folder: Path,
    steps: int = 12,
    ckpt: Path | None = None,
    module: Any = None,
    data: Any = None,
    **options: Any,
) -> tuple[Any, pl.Trainer]:
    module = Module() if module is None else module
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt)
    return module, trainer


def growing(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GrowingLayer)}


def driver(callback: Any) -> Any:
    return callback._driver


def grow(layer: Any, slots: int, opened: int | None = None) -> None:
    layer.set_counts("default", slots, slots if opened is None else opened)


def shake(layer: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def update_by_formula(method: str, layer: Any, config: Any, slots: int, opened: int) -> torch.Tensor:
    """dW as the papers write it, slot by slot, as a function of the parameters."""
    get = lambda role: layer.tensor(role, "default")  # noqa: E731
    rank = config.r + (slots - 1) * config.step_r
    if method == "increlora":
        parts = [get(f"B{i}") @ torch.diag(get(f"E{i}")) @ get(f"A{i}") for i in range(opened)]
        return sum(parts) * config.alpha / (rank + 1e-5)  # type: ignore[return-value]
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    ends = [config.r + i * config.step_r for i in range(slots)]
    A, B = torch.cat([get(f"A{i}") for i in range(slots)]), torch.cat([get(f"B{i}") for i in range(slots)], 1)
    for i, end in enumerate(ends):
        start = end - (config.step_r if i else config.r)
        total = total + B[:, start:end] @ get(f"L{i}") @ A[:end] + B[:, :end] @ get(f"U{i}") @ A[start:end]
    return total * config.alpha / (rank + 1e-5)


@BOTH
@pytest.mark.parametrize("slots", [1, 3])
def test_values_gradients_and_merging_are_those_of_the_formula(method: str, slots: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(9, 8)).double()
    config = CONFIGS[method](r=2, step_r=2, target_r=2, target_modules=["0"], alpha=3.0)
    handle: Any = get_peft_model(copy.deepcopy(model), config)
    layer = growing(handle)["base_model.model.0"]
    assert layer.num_slots(config) == 4, "2 + 2 + 2 + 2 of rank 8"
    x = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(handle(x), model(x)), "the model starts as its base"
    shake(layer)
    opened = slots + (method == "increlora")
    grow(layer, slots, opened)
    y = handle(x)
    delta = update_by_formula(method, layer, config, slots, opened)
    torch.testing.assert_close(y, model(x) + x @ delta.T, rtol=1e-10, atol=1e-12)
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    C = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((y * C).sum(), list(parameters.values()), allow_unused=True)
    expected = torch.autograd.grad((x @ delta.T * C).sum(), list(parameters.values()), allow_unused=True)
    assert sum(g is not None for g in ours) == opened * len(layer.slot_roles)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine is None) == (theirs is None), "what is not opened takes no part"
        if theirs is not None:
            assert theirs.abs().max() > 1e-4
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    merged: Any = copy.deepcopy(handle).merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-10, atol=1e-12)
    trained = y.detach()
    other: Any = get_peft_model(copy.deepcopy(model), config)
    assert not other.load_state_dict(handle.state_dict()).missing_keys
    assert torch.equal(other(x), trained), "how far a layer has grown comes with its values"


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_models_and_files(method: str, name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from tests.adapters.native.models import TARGETS

    base = build(name).eval()
    x = batch(name)
    handle: Any = get_peft_model(copy.deepcopy(base), CONFIGS[method](target_r=3, target_modules=TARGETS[name])).eval()
    assert torch.equal(output(handle, x), output(base, x))
    for index, layer in enumerate(growing(handle).values()):
        shake(layer, index)
        grow(layer, 1 + index % 3)
    trained = output(handle, x)
    handle.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()  # type: ignore[arg-type]
        assert torch.equal(output(loaded, x), trained)
    merged: Any = handle.merge_and_unload()
    torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(base.state_dict())


class Witness(pl.Callback):
    """In every step what is planned, has ``requires_grad``, gets a gradient and moves is one set, of a known size."""

    def __init__(self, method: Any) -> None:
        self.method, self.steps, self.sizes = method, 0, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate() and self.steps:
            return
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.planned = {n for n in self.method.trainable_names if "lora_" in n}
        own = {n: p for n, p in pl_module.named_parameters() if "lora_" in n}
        assert {n for n, p in own.items() if p.requires_grad} == self.planned
        assert {n for n, p in own.items() if p.grad is not None} == self.planned
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert all(id(own[n]) in held for n in self.planned)
        assert sum(own[n].numel() for n in self.planned) == self.expected(pl_module)
        self.sizes.append(self.expected(pl_module))

    def expected(self, pl_module: Any) -> int:
        total, config = 0, self.method.handle.peft_config["default"]
        for path, rank in self.method.ranks.items():
            layer = pl_module.model.get_submodule(path)
            sides = layer.in_features + layer.out_features
            if self.method.method == "increlora":
                ahead = driver(self.method).left > 0 and layer.num_slots(config) > layer.counts("default")[0]
                total += rank * (sides + 1) + ahead * config.step_r * sides
            else:
                total += rank * sides + rank * (rank + 1)  # two triangles with their diagonals
        return total

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        own = {n: p for n, p in pl_module.named_parameters() if "lora_" in n and not torch.equal(p, self.before[n])}
        moved = {
            n for n, p in own.items() if ("_E" not in n or n in self.planned or p.any())
        }  # gates are shut at the end
        if trainer.global_step >= 2:  # in the first step zeros stand between the factors
            assert moved <= self.planned
            assert len(moved) > 0.9 * len(self.planned)


@BOTH
def test_one_set_in_every_step(method: str, tmp_path: Path) -> None:
    callback = METHODS[method](seed=3)
    witness = Witness(callback)
    run([callback, witness], tmp_path)
    assert driver(callback).left == 0
    assert sum(callback.ranks.values()) == 2 * 8, "the whole budget, and no more"
    assert len(set(callback.ranks.values())) > 1
    assert len(set(witness.sizes)) >= 3
    assert callback.describe()["num_trainable_parameters"] == witness.sizes[-1]
    assert [step for step, _ in callback.history][:3] == [0, 3, 5], "after steps 2 and 4, counted from 0"


@BOTH
def test_resume(method: str, tmp_path: Path) -> None:
    module, _ = resume(lambda: [METHODS[method](period_steps=1)], tmp_path)
    assert len({layer.counts("default") for layer in growing(module).values()}) > 1


@BOTH
@pytest.mark.parametrize("batches", [3, 5, 6])  # in the middle of an accumulation window, and at its end
def test_kill_and_resume_anywhere(method: str, batches: int, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx + 1 == batches:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    def make(steps: int = 5, ckpt: Path | None = None, *more: Any) -> Any:
        callback = (
            METHODS[method](period_steps=1, warmup_steps=2)
            if method == "increlora"
            else METHODS[method](period_steps=1)
        )
        module, _ = run([callback, *more], tmp_path, steps, ckpt, accumulate_grad_batches=2)
        return module, callback

    whole, first = make(5, None, Save())
    again, second = make(5, tmp_path / "mid.ckpt")
    assert again.losses == whole.losses[-len(again.losses) :]
    assert len(again.losses) == 10 - batches
    assert_same_weights(dict(whole.state_dict()), dict(again.state_dict()))
    assert second.ranks == first.ranks
    assert second.history == first.history
    if method == "increlora":
        assert torch.equal(driver(second)._moments, driver(first)._moments)


# ---------------------------------------------------------------- IncreLoRA


def test_score_is_the_update_times_its_gradient(tmp_path: Path) -> None:
    """Against a weight that is added to the base as a leaf, whose gradient autograd gives."""
    callback = IncreLoRA(target_rank=2, period_steps=100, layers="*.fc1", orthogonality=0.0)
    module, _ = run([callback], tmp_path, 3)
    watch = driver(callback)
    for layer in growing(module).values():
        shake(layer)
        watch._set_gate(layer, 1, 1e-5)
    x = batch("vit")
    watch.started()
    watch._pending.zero_()
    output(module.model, x).square().mean().backward()
    watch.finished()
    updates = [layer.delta_matrix("default").detach().requires_grad_() for layer in growing(module).values()]
    plain = build("vit")
    for block, update in zip(plain.blocks, updates, strict=True):
        block.fc1.forward = lambda h, layer=block.fc1, w=update: nn.functional.linear(h, layer.weight + w, layer.bias)
    output(plain, x).square().mean().backward()
    expected = [float((u.detach() * u.grad).abs().sum() / math.sqrt(u.numel())) for u in updates]  # type: ignore
    assert watch._pending.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0


def test_the_layers_that_grow_have_the_highest_smoothed_scores(tmp_path: Path) -> None:
    callback = IncreLoRA(target_rank=2, period_steps=2, start_step=3, layers_per_growth=3, beta1=0.7, beta2=0.6)
    seen: list[list[float]] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append(driver(callback)._pending.tolist())

    run([callback, Look()], tmp_path)
    names = list(driver(callback).layers)
    importance, uncertainty, ranks, growths = np.zeros(8), np.zeros(8), np.ones(8, int), []
    for step, scores in enumerate(np.array(seen)):
        if ranks.sum() == 16:
            break
        importance = 0.7 * importance + 0.3 * scores
        uncertainty = 0.6 * uncertainty + 0.4 * np.abs(scores - importance)
        if step > 3 and step % 2 == 0:
            best = np.argsort(-importance * uncertainty)[: min(3, 16 - ranks.sum())]
            ranks[best] += 1
            growths.append(step + 1)
    assert callback.ranks == dict(zip(names, ranks.tolist(), strict=True))
    assert [step for step, _ in callback.history] == [0, *growths]
    assert len(growths) == 3
    np.testing.assert_allclose(driver(callback)._moments.numpy(), [importance, uncertainty], rtol=1e-4)


def test_the_gate_of_the_next_rank_is_ajar_until_growing_ends(tmp_path: Path) -> None:
    class Gates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[set[float]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layers = growing(pl_module).values()
            gates = [layer.tensor(f"E{layer.counts('default')[0]}", "default") for layer in layers]
            self.seen.append({round(float(gate), 9) for gate in gates})

    callback, gates = METHODS["increlora"](), Gates()
    module, _ = run([callback, gates], tmp_path)
    assert gates.seen[:7] == [{1e-5}] * 7
    assert gates.seen[7:] == [{0.0}] * 5
    assert all(
        allocated == opened for allocated, opened in (layer.counts("default") for layer in growing(module).values())
    )
    without = IncreLoRA(target_rank=2, period_steps=2, layers_per_growth=3, advance_learning=False)
    gates = Gates()
    run([without, gates], tmp_path)
    assert gates.seen == [{0.0}] * 12
    assert driver(without).left == 0


def test_new_rank_warms_up(tmp_path: Path) -> None:
    """With plain SGD a step is ``rate * gradient``: new rank moves by 0, 1/3, 2/3 of it, then by all."""

    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    callback = IncreLoRA(
        target_rank=2, period_steps=2, layers_per_growth=8, warmup_steps=3, alpha=1.0, orthogonality=0.0
    )
    factors: dict[str, list[float]] = {"E0": [], "E1": []}

    class Moves(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layer = next(iter(growing(pl_module).values()))
            self.now = {r: (layer.tensor(r, "default"), layer.tensor(r, "default").detach().clone()) for r in factors}

        def on_train_batch_end(self, *_: Any) -> None:
            for role, (p, before) in self.now.items():
                if p.grad is not None:
                    factors[role].append(float((before - p.detach()) / (0.5 * p.grad)))

    run([callback, Moves()], tmp_path, 8, module=Plain())
    assert factors["E0"] == pytest.approx([1.0] * 8, rel=1e-2)
    assert factors["E1"] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0, 1.0], rel=1e-2, abs=1e-4)


# ---------------------------------------------------------------- TriAdaptLoRA


def test_threshold_and_scores_of_triadapt(tmp_path: Path) -> None:
    assert [num_growing(10, p, "linear") for p in (0.0, 0.05, 0.25, 0.5, 1.0)] == [1, 1, 2, 5, 10]
    assert [num_growing(100, p, "exponential") for p in (0.0, 0.25, 0.5, 0.99)] == [1, 3, 10, 95]
    callback = METHODS["triadapt_lora"](total_steps=8)
    cores: list[list[float]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            norms = []
            for layer in growing(pl_module).values():
                slots = layer.counts("default")[0]
                C = np.zeros((slots, slots))
                for i in range(slots):  # rank one a slot: row i of the lower, column i of the upper triangle
                    C[i, : i + 1] += layer.tensor(f"L{i}", "default").detach().numpy()[0]
                    C[: i + 1, i] += layer.tensor(f"U{i}", "default").detach().numpy()[:, 0]
                norms.append(float(np.linalg.norm(C)))
            cores.append(norms)

    run([callback, Look()], tmp_path)
    ranks, last = np.ones(8, int), np.zeros(8)
    for step in range(2, 12, 2):
        if ranks.sum() == 16:
            break
        norms = (
            np.array(cores[step + 1]) / ranks
        )  # after this step: new rows and columns are zero, blocks counted before
        count = max(1, int((16 - ranks.sum()) * min(1.0, step / 8)))
        ranks[np.argsort(-(norms - last))[:count]] += 1
        last = norms
    assert list(callback.ranks.values()) == ranks.tolist()
    assert ranks.sum() == 16


# ---------------------------------------------------------------- limits and mistakes


@BOTH
def test_no_layer_grows_beyond_its_limit(method: str, tmp_path: Path) -> None:
    callback = METHODS[method](max_rank=2, layers=["*.fc1", "*.fc2"], period_steps=1, step_rank=1)
    run([callback], tmp_path)
    assert set(callback.ranks.values()) == {2}
    uneven = METHODS[method](target_rank=3, step_rank=3, max_rank=9, layers=["*.fc1", "*.fc2"], period_steps=1)
    run([uneven], tmp_path)
    assert sum(uneven.ranks.values()) == 4 + 2 * 3, "8 are left, of which whole steps of 3 fit twice"


@BOTH
def test_mistakes(method: str, tmp_path: Path) -> None:
    config = CONFIGS[method]
    for options, text in (
        ({"target_r": 0}, "target_r=0"),
        ({"r": 4, "target_r": 2}, "less than r=4"),
        ({"target_r": 8, "max_r": 4}, "max_r=4"),
        ({"period_steps": 0}, "period_steps=0"),
        ({"alpha": 0.0}, "alpha"),
        ({"perod_steps": 1}, "'period_steps'"),
    ):
        with pytest.raises(ConfigError, match=text):
            config(**options)
    with pytest.raises(PlanConflict, match="by scores of all of them in every step"):
        run([METHODS[method](), IST(0.5, score_period_steps=2, scope="adapters")], tmp_path)
    with pytest.raises(ConfigError, match=r"r=40 is more than blocks"):
        get_peft_model(build("vit"), config(r=40, target_r=40, target_modules=["qkv"]))
    if method == "triadapt_lora":
        with pytest.raises(ConfigError, match="threshold='liner'"):
            TriAdaptLoRAConfig(threshold="liner")  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match="beta1"):
            IncreLoRAConfig(beta1=1.0)
