"""What needs the loop: allocations, task ids and regularisers, each against its formula written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel

from lightning_peft import IST, PEGO, AdaMSS, Adapter, BALoRA, Poly
from lightning_peft.adapters.adamss import num_kept
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.errors import ConfigError, PlanConflict
from tests.adapters.test_adapter import SaveAll, fit, logits, pytestmark  # noqa: F401
from tests.contract.harness import Probe, TinyModule, _pretrained, assert_same_weights, loader, weights

MODEL = "gqa_decoder"


class Watch(pl.Callback):
    """Look at every optimizer step with ``look(pl_module)``, right before the optimizer moves."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(self.look(pl_module))


def check_resume(tmp_path: Path, make: Any, expected: TinyModule, **options: Any) -> None:
    points = sorted(tmp_path.glob("*.ckpt"))
    assert len(points) == 11
    for point in (points[2], points[6]):  # in the middle of an accumulation window, and after a step
        module, _ = fit(tmp_path, *make(), ckpt=point, **options)
        assert_same_weights(weights(module), weights(expected))


# ---------------------------------------------------------------------------------------------------- AdaMSS

SCHEDULE = {"target_subspaces": 3, "start_step": 1, "end_step": 4, "period_steps": 2, "exponent": 1.0}


def adamss() -> AdaMSS:
    return AdaMSS(rank=6, num_subspaces=2, layers="*.q_proj", **SCHEDULE)


def test_adamss_drops_the_least_important_subspaces(tmp_path: Path) -> None:
    adapter = adamss()
    probe = Probe([adapter])
    grads = Watch(lambda m: {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    after: list[dict[str, torch.Tensor]] = []

    class After(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                after.append(weights(pl_module))

    module, run = fit(tmp_path, adapter, probe, grads, After(), SaveAll(tmp_path))
    assert run.global_step == 6
    # planned = requires_grad = with a gradient = moved, in every step, also after each allocation
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient
        assert step.moved <= step.planned
    # per subspace one row over 6 singular vectors and one number for each of its rows, which share out the 8 of a layer
    assert sum(p.numel() for n, p in module.named_parameters() if "adamss" in n) == 4 * (2 * 6 + 8)
    # allocations of steps 2 and 4: 3 + (8 - 3)(1 - 1/3) = 6, and 3; each subspace is two factors
    assert [len(step.planned) for step in probe.steps] == [16, 16, 16, 12, 12, 6]
    assert num_kept(2, 8, 3, 1, 4, 1.0) == 6

    # which ones: running means of |w g| and of its variation since the last allocation
    for first, last, kept in ((1, 2, 6), (3, 4, 3)):
        importance: dict[str, float] = {}
        for name in grads.seen[last]:
            mean = variation = torch.zeros_like(after[0][name])
            for step in range(first, last + 1):
                now = (after[step][name] * grads.seen[step][name]).abs()
                variation = 0.85 * variation + 0.15 * (now - mean).abs()
                mean = 0.85 * mean + 0.15 * now
            unit = name.replace("adamss_A", "adamss_B")
            importance[unit] = importance.get(unit, 0.0) + float((mean * variation).mean())
        best = sorted(importance, key=lambda unit: -importance[unit])[:kept]
        assert {n for n in probe.steps[last + 1].planned if "adamss_B" in n} == set(best)

    check_resume(tmp_path, lambda: [adamss()], module)


def test_adamss_is_drawn_in_the_ledger_and_works_by_name(tmp_path: Path) -> None:
    config = {
        "r": 6,
        "num_subspaces": 2,
        "use_asa": True,
        "asa_target_subspaces": 3,
        "init_warmup": 1,
        "final_warmup": 4,
        "mask_interval": 2,
        "asa_schedule_exponent": 1.0,
    }
    adapter = Adapter("adamss", config, layers="*.q_proj")
    module, _ = fit(tmp_path, adapter)
    expected, _ = fit(tmp_path, adamss())
    assert_same_weights(weights(module), weights(expected))
    assert [step for step, _ in adapter.history] == [0, 3, 5]
    assert len(adapter.active_units()) == 3
    still = AdaMSS(rank=6, num_subspaces=2, layers="*.q_proj")
    fit(tmp_path, still)
    assert len(still.history) == 1


def test_adamss_mistakes(tmp_path: Path) -> None:
    with pytest.raises(PlanConflict, match="by scores of all of them in every step"):
        fit(tmp_path, adamss(), IST(0.5, score_period_steps=2, scope="adapters"))
    with pytest.raises(ConfigError, match="no multiple of period_steps=100 lies"):
        AdaMSS(target_subspaces=3, start_step=10, end_step=90)
    with pytest.raises(ConfigError, match="asa_target_subspaces"):
        AdaMSS(target_subspaces=0)
    with pytest.raises(ConfigError, match="final_warmup"):
        AdaMSS(target_subspaces=3, start_step=200, end_step=200)


# ---------------------------------------------------------------------------------------------------- Poly


class ByTask(TinyModule):
    """The batch is a mapping with the task of each row."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"input_ids": batch[0], "labels": batch[0], "task": batch[1]}

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss


def poly(**options: Any) -> Poly:
    return Poly(5, **{"num_skills": 3, "rank": 2, "task_ids": "task", "layers": "*.up_proj", **options})


@pytest.mark.parametrize("num_splits", [1, 2])
def test_poly_mixes_skills_by_the_task_of_each_row(num_splits: int, tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Looks(ByTask):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            layer = self.model.model.layers[1].mlp.up_proj
            with layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out, batch["task"]))):
                self.loss(batch)

    def make() -> Poly:
        return poly(num_splits=num_splits, router_lr_ratio=30.0)

    adapter = make()
    module, run = fit(tmp_path, adapter, SaveAll(tmp_path), module=Looks(MODEL))
    layer = module.model.model.layers[1].mlp.up_proj
    parameters = [p for n, p in module.named_parameters() if n in adapter.trainable_names]
    assert sum(p.numel() for p in parameters) == 4 * (3 * 2 * (8 + 12) + 5 * 3 * num_splits)

    seen.clear()
    run.validate(module, run.val_dataloaders, verbose=False)
    a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    logits = layer.poly_router["default"].module_logits
    assert b.abs().max() > 0.01
    assert logits.abs().max() > 0.05  # the routers learn too
    for values in seen:
        x, out, tasks = (value.clone() for value in values)
        for row, task in enumerate(tasks):
            share = torch.sigmoid(logits[task]).view(num_splits, 3)
            share = share / share.sum(1, keepdim=True)
            mixed_a = torch.cat([sum(share[q, s] * a[q, s] for s in range(3)) for q in range(num_splits)])
            mixed_b = torch.cat([sum(share[q, s] * b[q, s] for s in range(3)) for q in range(num_splits)], 1)
            expected = layer.base_layer(x[row]) + x[row] @ mixed_a @ mixed_b / 2
            torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-6)
    assert len({int(task) for *_, tasks in seen for task in tasks}) > 1

    points = sorted(tmp_path.glob("*.ckpt"))
    for point in (points[2], points[5]):
        again, _ = fit(tmp_path, make(), module=Looks(MODEL), ckpt=point)
        assert_same_weights(weights(again), weights(module))
    assert not any(name in vars(module) for name in ("training_step", "validation_step"))
    with pytest.raises(ValueError, match="task_ids should not be None"):  # outside a step: peft's own word
        module.model(input_ids=torch.zeros(1, 3, dtype=torch.long))


def test_poly_by_position_and_with_peft_alone(tmp_path: Path) -> None:
    adapter = poly(task_ids=1)
    fit(tmp_path, adapter)  # the batch is a pair
    folder = adapter.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(_pretrained(MODEL)), str(folder)).eval()
    x, y = next(iter(loader(MODEL)))
    expected = adapter.handle.eval().base_model(input_ids=x, task_ids=y, use_cache=False).logits
    assert torch.equal(loaded.base_model(input_ids=x, task_ids=y, use_cache=False).logits, expected)
    assert not torch.equal(loaded.base_model(input_ids=x, task_ids=(y + 1) % 5, use_cache=False).logits, expected)


class Doubled(ByTask):
    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss({name: torch.cat([value, value]) for name, value in batch.items()})


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"task_ids": "tsk"}, ByTask, r"task_ids='tsk'.*input_ids, labels, task.*Did you mean 'task'"),
        ({"task_ids": "input_ids"}, ByTask, r"one whole number per row.*\(2, 7\)"),
        ({"task_ids": "task"}, TinyModule, "a sequence of 2 and has no such entry. Give its position"),
        ({"task_ids": 2}, TinyModule, "a sequence of 2 and has no such entry"),
        ({"num_tasks": 2}, ByTask, "with 2 tasks they go from 0 to 1"),
        ({}, Doubled, "a layer got 4 rows and the batch has 2 task ids"),
    ],
)
def test_poly_without_the_right_ids(options: Any, module: Any, message: str, tmp_path: Path) -> None:
    adapter = Poly(**{"num_tasks": 5, "task_ids": "task", "layers": "*.up_proj", **options})
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, adapter, module=module(MODEL))


def test_poly_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"num_tasks=0, rank=1.5"):
        Poly(0, rank=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="above 0"):
        Poly(3, router_lr_ratio=0)


# ---------------------------------------------------------------------------------------------------- regularisers


class Records(pl.Callback):
    """What training_step returned, and the weights that it was computed with."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.batches: list[Any] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(weights(pl_module))
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


class Elsewhere(pl.Callback):
    """Training starts with other factors than the method's."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in pl_module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0.0, self.scale, generator=generator)


class TwoLosses(TinyModule):
    """Keeps its own loss, without dropout; the loss is not needed where only the regulariser is looked at."""

    def __init__(self, model: str = MODEL, factor: float = 1.0) -> None:
        super().__init__(model)
        self.factor, self.own = factor, []
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.factor * self.loss(batch)
        self.own.append(loss.detach())
        return loss


def pego_by_hand(values: dict[str, torch.Tensor], group_size: int, rank: int) -> torch.Tensor:
    total = torch.zeros(())
    for name, a in values.items():
        if "lora_A" in name:
            path = name.partition(".lora_A")[0]
            b, w = values[name.replace("lora_A", "lora_B")], values[f"{path}.base_layer.weight"]
            w = w.flatten(1)
            parts = [slice(i * rank, (i + 1) * rank) for i in range(group_size)]
            updates = [b.flatten(1)[:, part] @ a.flatten(1)[part] for part in parts]
            total = total + sum((w @ u.T).abs().sum() for u in updates)
            for i in range(group_size):
                for j in range(i + 1, group_size):
                    total = total + (updates[i] @ updates[j].T).abs().sum()
    return total


@pytest.mark.parametrize("data", [MODEL, "conv_net"])
def test_pego_keeps_the_group_orthogonal(data: str, tmp_path: Path) -> None:
    def make() -> PEGO:
        return PEGO(rank=2, group_size=3, weight=1.0, layers="*.up_proj" if data == MODEL else "*.conv")

    records, adapter = Records(), make()
    module, _ = fit(tmp_path, adapter, records, SaveAll(tmp_path), module=TwoLosses(data), data=data)
    assert len(records.losses) == 11
    for loss, own, values in zip(records.losses, module.own, records.weights, strict=True):
        torch.testing.assert_close(2 * loss - own, pego_by_hand(values, 3, 2), rtol=1e-3, atol=1e-5)
    assert 2 * records.losses[-1] - module.own[-1] > 0.01
    assert module.training_step.__func__ is TwoLosses.training_step  # given back

    for point in sorted(tmp_path.glob("*.ckpt"))[2:6:3]:
        again, _ = fit(tmp_path, make(), module=TwoLosses(data), data=data, ckpt=point)
        assert_same_weights(weights(again), weights(module))


def test_pego_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    records = Records()
    adapter = PEGO(rank=2, group_size=2, weight=0.5, layers="*.q_proj")
    fit(tmp_path, adapter, records, Elsewhere(), module=TwoLosses(factor=0.0))
    values = {n: v.clone().requires_grad_() for n, v in records.weights[4].items()}  # the third step's
    (0.5 * pego_by_hand(values, 2, 2)).backward()
    found = 0
    for name, gradient in records.gradients[2].items():
        expected = values[name].grad
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        found += bool(gradient.abs().max() > 0.01)
    assert found == 8


def test_pego_is_a_lora_that_merges(tmp_path: Path) -> None:
    adapter = PEGO(rank=2, group_size=2)
    module, _ = fit(tmp_path, adapter)
    own = [p for n, p in module.named_parameters() if n in adapter.trainable_names]
    assert sum(p.numel() for p in own) == sum(
        4 * (w.shape[0] + w.shape[1]) for n, w in weights(module).items() if "base_layer" in n
    )
    before = logits(module.model)
    torch.testing.assert_close(logits(merge_adapters(adapter.handle)), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="group_size=0"):
        PEGO(group_size=0)
    with pytest.raises(ConfigError, match="weight=-1"):
        PEGO(weight=-1)


# ---------------------------------------------------------------------------------------------------- BA-LoRA


class Prompted(TwoLosses):
    """The first two tokens of each row are a prompt, without a loss."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        labels = batch[0].clone()
        labels[:, :2] = -100
        return {"input_ids": batch[0], "labels": labels}

    def loss(self, batch: Any) -> torch.Tensor:
        logits = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), batch["input_ids"][:, 2:].flatten())


def ba_lora_by_hand(logits: torch.Tensor, reference: torch.Tensor, weights: tuple[float, float, float]) -> torch.Tensor:
    z, y = logits[:, 1:-1].flatten(0, 1), reference[:, 1:-1].flatten(0, 1)  # these predict tokens 2 to the last
    p, q = torch.softmax(y / 2, 1), torch.softmax(z / 2, 1)
    consistency = 4 * (p * (p.log() - q.log())).sum(1).mean()
    kept = torch.sort(z, dim=1, descending=True).values[:, :4]
    entropy = torch.distributions.Categorical(logits=kept).entropy().mean()
    singular = torch.linalg.svdvals(z)
    share = singular[:3].sum() / singular.square().sum().sqrt()
    return weights[0] * consistency - weights[1] * entropy - weights[2] * share


def ba_lora(**options: Any) -> BALoRA:
    return BALoRA(2, **{"top_tokens": 4, "top_singular": 3, "layers": "*.up_proj", **options})


WEIGHTS = (3.0, 0.5, 0.25)
OPTIONS = dict(zip(("consistency", "diversity", "spectrum"), WEIGHTS, strict=True))


def test_ba_lora_against_the_formulas_and_the_pretrained_model(tmp_path: Path) -> None:
    class Keeps(Prompted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((batch, weights(self), [m.training for m in self.modules()]))
            return super().training_step(batch, batch_idx)

    seen: list[Any] = []
    records, adapter = Records(), ba_lora(**OPTIONS)
    module, _ = fit(tmp_path, adapter, records, Elsewhere(30.0), SaveAll(tmp_path), module=Keeps())
    pretrained = copy.deepcopy(_pretrained(MODEL)).eval()
    final = weights(module)
    for (batch, values, modes), loss, own in zip(seen, records.losses, module.own, strict=True):
        assert modes == [m.training for m in module.train().modules()]
        module.load_state_dict(values)
        with torch.no_grad():
            logits = module.model(input_ids=batch["input_ids"], use_cache=False).logits
            reference = pretrained(input_ids=batch["input_ids"], use_cache=False).logits
        expected = ba_lora_by_hand(logits, reference, WEIGHTS)
        torch.testing.assert_close(2 * loss - own, expected, rtol=1e-4, atol=1e-4)
        assert ba_lora_by_hand(logits, reference, (3.0, 0.0, 0.0)) > 1e-3
    module.load_state_dict(final)
    for point in sorted(tmp_path.glob("*.ckpt"))[2:6:3]:
        resumed, _ = fit(tmp_path, ba_lora(**OPTIONS), module=Prompted(), ckpt=point)
        assert_same_weights(weights(resumed), weights(module))


def test_ba_lora_gradient_is_that_of_the_formula(tmp_path: Path) -> None:
    class Keeps(Prompted):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((batch, weights(self)))
            return super().training_step(batch, batch_idx)

    seen: list[Any] = []
    records = Records()
    module, _ = fit(tmp_path, ba_lora(**OPTIONS), records, Elsewhere(), module=Keeps(factor=0.0))
    pretrained = copy.deepcopy(_pretrained(MODEL)).eval()
    names = list(records.gradients[1])
    total = {name: torch.zeros_like(records.gradients[1][name]) for name in names}
    for batch, values in seen[2:4]:  # the two micro-batches of the second step
        module.load_state_dict(values)
        parameters = dict(module.named_parameters())
        reference = pretrained(input_ids=batch["input_ids"], use_cache=False).logits.detach()
        logits = module.model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = ba_lora_by_hand(logits, reference, WEIGHTS) / 2
        for name, gradient in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True):
            total[name] += gradient
    assert len(names) == 8
    for name in names:
        torch.testing.assert_close(records.gradients[1][name], total[name], rtol=1e-3, atol=1e-6)
    assert max(gradient.abs().max() for gradient in total.values()) > 1e-3


def test_ba_lora_compares_with_a_model_that_drops_nothing(tmp_path: Path) -> None:
    class Drops(Prompted):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.model.model.layers:  # pyright: ignore
                layer.self_attn.attention_dropout = 0.5

        def loss(self, batch: Any) -> torch.Tensor:
            with self.model.register_forward_hook(lambda *_: logits.append(_[-1].logits.detach().clone())):
                return super().loss(batch)

    logits: list[torch.Tensor] = []
    records = Records()
    module = Drops()
    fit(tmp_path, ba_lora(consistency=1e6, diversity=0.0, spectrum=0.0), records, Elsewhere(30.0), module=module)
    pretrained = copy.deepcopy(_pretrained(MODEL)).eval()
    reference = pretrained(input_ids=records.batches[0]["input_ids"], use_cache=False).logits.detach()
    torch.testing.assert_close(logits[0], reference)  # the second pass comes to an end first
    expected = ba_lora_by_hand(logits[1], reference, (1e6, 0.0, 0.0))
    torch.testing.assert_close(2 * records.losses[0] - module.own[0], expected, rtol=1e-3, atol=1e-3)


def test_ba_lora_without_the_second_pass(tmp_path: Path) -> None:
    calls: list[bool] = []

    class Counts(Prompted):
        def on_fit_start(self) -> None:
            self.model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    fit(tmp_path, ba_lora(consistency=0.0), module=Counts())
    assert calls.count(True) == 11
    assert calls.count(False) == 2  # validation
    calls.clear()
    fit(tmp_path, ba_lora(), module=Counts())
    assert calls.count(False) == 13


def test_ba_lora_mistakes(tmp_path: Path) -> None:
    class Twice(Prompted):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) + super().loss(batch)

    with pytest.raises(ConfigError, match="there were 2"):
        fit(tmp_path, ba_lora(), module=Twice())
    with pytest.raises(ConfigError, match=r"labels='label'.*Did you mean 'labels'"):
        fit(tmp_path, ba_lora(labels="label"), module=Prompted())
    with pytest.raises(ConfigError, match=r"\(2, 7, 19\) and \(2,\)"):
        fit(tmp_path, ba_lora(labels=1), module=TwoLosses())
    with pytest.raises(ConfigError, match=r"diversity=-1.*temperature=0.*top_singular=0"):
        BALoRA(diversity=-1, temperature=0, top_singular=0)


def test_ba_lora_goes_on_from_a_model_that_another_run_has_trained(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, ba_lora(), Elsewhere(30.0), module=Prompted())
    records = Records()
    fit(tmp_path, ba_lora(consistency=1.0, diversity=0.0, spectrum=0.0), records, module=module)
    batch = records.batches[0]
    reference = copy.deepcopy(_pretrained(MODEL)).eval()(input_ids=batch["input_ids"], use_cache=False).logits
    module.load_state_dict(records.weights[0])
    logits = module.model(input_ids=batch["input_ids"], use_cache=False).logits
    expected = ba_lora_by_hand(logits, reference, (1.0, 0.0, 0.0))
    assert expected > 1e-4
    torch.testing.assert_close(2 * records.losses[0] - module.own[11], expected.detach(), rtol=1e-2, atol=1e-6)
