"""GreenTrainer: the knapsack against brute force, importance against a plain re-computation, FLOPs within budget."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import LISA, GreenTrainer
from lightning_peft.core.flops import measure_step
from lightning_peft.core.rng import get_rng_state
from lightning_peft.errors import ConfigError, EffectError
from lightning_peft.methods.layers.green_trainer import backward_budget, fill_budget, rehearsed_step, select_tensors
from lightning_peft.methods.moment import Moment
from tests.contract.harness import MODELS, Probe, TinyModule, loader, trainer, weights
from tests.contract.test_resume import SaveEveryBatch
from tests.core.test_flops import CPU_ATTENTION, train_only

# ---------------------------------------------------------------------------------------------------- the knapsack


def cost_of(chosen: Sequence[int], weight: Sequence[Any], reach: Sequence[int]) -> Any:
    return sum(weight[i] for i in chosen) + (reach[max(chosen)] if chosen else 0)


def best_value(importance: Sequence[int], weight: Sequence[Any], reach: Sequence[int], budget: int) -> int:
    """The largest total importance of any affordable set, by trying all."""
    indices = range(len(importance))
    sets = itertools.chain.from_iterable(itertools.combinations(indices, size) for size in range(len(importance) + 1))
    return max(sum(importance[i] for i in chosen) for chosen in sets if cost_of(chosen, weight, reach) <= budget)


@st.composite
def cases(draw: st.DrawFn, largest: int = 12) -> tuple[list[int], list[int], list[int], int]:
    count = draw(st.integers(1, 10))
    numbers = st.lists(st.integers(0, largest), min_size=count, max_size=count)
    importance = draw(st.lists(st.integers(-6, 20), min_size=count, max_size=count))
    reach = list(itertools.accumulate(draw(numbers)))
    weight = draw(numbers)
    return importance, weight, reach, draw(st.integers(0, sum(weight) + reach[-1] + 2))


@given(cases())
@settings(max_examples=400, deadline=None)
def test_selection_is_optimal(case: tuple[list[int], list[int], list[int], int]) -> None:
    importance, weight, reach, budget = case
    chosen = select_tensors(importance, weight, reach, budget)
    assert chosen == sorted(set(chosen))
    assert cost_of(chosen, weight, reach) <= budget
    assert sum(importance[i] for i in chosen) == best_value(importance, weight, reach, budget)
    assert all(importance[i] > 0 for i in chosen)


@given(cases(largest=10**9), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_budget_holds_at_any_resolution(case: tuple[list[int], list[int], list[int], int], resolution: int) -> None:
    importance, weight, reach, budget = case
    chosen = select_tensors(importance, weight, reach, budget, resolution)
    assert cost_of(chosen, weight, reach) <= budget
    assert all(importance[i] > 0 for i in chosen)
    # At least as good as the best set when every cost is rounded up to the resolution.
    unit = Fraction(budget, resolution) if budget > resolution else Fraction(1)
    coarse = [-(-w // unit) * unit for w in weight]
    assert sum(importance[i] for i in chosen) >= best_value(importance, coarse, reach, budget)


def test_costs_that_scale_together_choose_the_same() -> None:
    """Half the batch on each of two processes: all costs halve, and the choice stays."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        weight = torch.randint(0, 10**6, (40,), generator=generator).tolist()
        reach = torch.randint(0, 10**6, (40,), generator=generator).cumsum(0).tolist()
        importance = torch.rand(40, generator=generator).tolist()
        budget = Fraction("0.37") * (sum(weight) + reach[-1])
        once = select_tensors(importance, weight, reach, budget)
        assert once == select_tensors(importance, [2 * w for w in weight], [2 * r for r in reach], 2 * budget)
        assert len(once) > 3


def test_budget_follows_the_paper() -> None:
    assert backward_budget(0.5, 100, 200) == 50  # half of 300, less the forward pass
    assert backward_budget(1.0, 100, 200) == 200
    assert backward_budget(0.7, 100, 200) == 110
    assert backward_budget(0.2, 100, 200) == 10  # less than the forward pass alone: 5 % of back-propagation


@pytest.mark.parametrize("model", MODELS)
def test_filling_the_budget(model: str) -> None:
    module = TinyModule(model)
    batch = next(iter(loader(model)))
    cost, _, _ = measure_step(lambda: module.loss(batch), dict(module.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    for fraction in ("0.1", "0.3", "0.6", "0.9"):
        for _ in range(3):
            importance = dict(zip(cost.names, torch.randn(len(cost.names), generator=generator).tolist(), strict=True))
            budget = Fraction(fraction) * cost.backward_flops()
            paid = [cost.names[-1]]
            chosen = fill_budget(
                cost, {name: gain for name, gain in importance.items() if name not in paid}, budget, paid
            )
            if cost.backward_flops(paid) > budget:
                assert chosen == []
                continue
            assert cost.backward_flops([*paid, *chosen]) <= budget
            # What is left buys nothing more that has any importance.
            for name in set(cost.names).difference(chosen, paid):
                assert importance[name] <= 0 or cost.backward_flops([*paid, *chosen, name]) > budget or len(chosen) == 1


def test_without_any_gain_the_best_that_fits_trains() -> None:
    module = TinyModule("gqa_decoder")
    batch = next(iter(loader("gqa_decoder")))
    cost, _, _ = measure_step(lambda: module.loss(batch), dict(module.named_parameters()))
    importance = {name: -1.0 - index for index, name in enumerate(cost.names)}  # the embedding is best, and deepest
    everything = cost.backward_flops()
    assert fill_budget(cost, importance, everything) == ["model.model.embed_tokens.weight"]
    reachable = cost.backward_flops(["model.model.layers.3.mlp.down_proj.weight"])
    allowed = [name for name in cost.names if cost.backward_flops([name]) <= reachable]
    assert fill_budget(cost, importance, reachable) == [max(allowed, key=lambda name: importance[name])]
    assert fill_budget(cost, importance, -1) == []


# ---------------------------------------------------------------------------------------------------- the trial step

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, amsgrad=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), weight_decay=0.3, foreach=False),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.3),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def snapshot(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Any:
    return copy.deepcopy(
        (
            [p.detach() for p in parameters],
            [None if p.grad is None else p.grad for p in parameters],
            optimizer.state_dict(),
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            [key for key in vars(optimizer) if key != "state"],
        )
    )


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trial_step_is_taken_back(name: str, steps_before: int, fails: bool) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    optimizer = OPTIMIZERS[name](parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for _ in range(steps_before):
        for parameter in parameters[:2]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    calls.clear()
    before, schedule_before = snapshot(optimizer, parameters), copy.deepcopy(schedule.state_dict())
    objects = [optimizer.state[p] for p in parameters if p in optimizer.state]
    try:
        with rehearsed_step([optimizer], parameters) as old:
            assert_equal([v.clone() for v in old], before[0])
            assert not torch.equal(parameters[0], before[0][0])
            assert torch.equal(parameters[2], before[0][2])
            if fails:
                raise KeyError("scoring fails")
    except KeyError:
        assert fails
    assert_equal(snapshot(optimizer, parameters), before)
    assert_equal(schedule.state_dict(), schedule_before)
    assert [id(optimizer.state[p]) for p in parameters if p in optimizer.state] == [id(each) for each in objects]
    assert calls == []
    optimizer.step()
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_does_not_pass_for_a_gain(name: str) -> None:
    changes = []
    for decay in (0.0, 0.5):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = OPTIMIZERS[name]([parameter])
        optimizer.param_groups[0]["weight_decay"] = decay
        parameter.grad = torch.tensor([0.1, -2.0, 0.0])
        with rehearsed_step([optimizer], [parameter]) as (old,):
            changes.append((parameter.detach() - old).tolist())
    assert changes[0] == changes[1]
    assert changes[0][2] == 0


def test_a_trial_step_in_the_first_step_of_a_warm_up() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    parameter.grad = torch.ones(3)
    with rehearsed_step([optimizer], [parameter]):
        assert parameter.tolist() == [0.5, 0.5, 0.5]
    assert parameter.tolist() == [1, 1, 1]
    assert optimizer.param_groups[0]["lr"] == 0


def test_an_optimizer_around_another_one_is_refused() -> None:
    class Lookahead(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.inner = torch.optim.SGD(parameters, lr=0.1)

    with pytest.raises(ConfigError, match="Lookahead wraps SGD"):
        with rehearsed_step([Lookahead([nn.Parameter(torch.ones(2))])], []):
            pass


# ---------------------------------------------------------------------------------------------------- in a fit


class Watched(GreenTrainer):
    """Keeps what went into each draw and checks that scoring changed nothing."""

    def observe(self, moment: Moment) -> None:
        module, optimizer = moment.pl_module, moment.trainer.optimizers[0]
        named = dict(module.named_parameters())

        def everything() -> Any:
            return copy.deepcopy(
                (
                    snapshot(optimizer, list(named.values())),
                    weights(module),
                    {name: p.requires_grad for name, p in named.items()},
                    {name: m.training for name, m in module.named_modules()},
                    get_rng_state(),
                    [config.scheduler.state_dict() for config in moment.trainer.lr_scheduler_configs],
                    dict(moment.trainer.callback_metrics),
                    vars(optimizer).get("_opt_called"),
                )
            )

        before, reports = everything(), len(self._reports)
        module_copy = copy.deepcopy({"weights": weights(module), "optimizer": optimizer.state_dict()})
        super().observe(moment)
        assert_equal(everything(), before)
        assert "log" not in vars(module)
        if len(self._reports) > reports:
            self.__dict__.setdefault("draws_seen", []).append((module_copy, moment.batch, get_rng_state()))


class Logging(TinyModule):
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fraction", [0.5, 0.7])
def test_flops_stay_within_the_budget_and_scoring_leaves_no_trace(
    fraction: float, model: str, optimizer: str, tmp_path: Path
) -> None:
    method = Watched(fraction, redraw=3)
    module = Logging(model, optimizer)
    trainer(tmp_path, [method]).fit(module, loader(model), loader(model, shuffle=False))
    draws = method.describe()["draws"]
    assert [draw["step"] for draw in draws] == [0, 3, 6, 9] == [step for step, _ in method.history]
    for draw, (_, batch, _), (_, names) in zip(draws, method.draws_seen, method.history, strict=True):  # type: ignore
        train_only(module, module.state_dict())
        assert draw["full_flops"] == counted(module, batch)
        train_only(module, names)
        assert draw["measured_flops"] == draw["planned_flops"] == counted(module, batch)
        assert draw["measured_flops"] <= draw["budget_flops"] <= fraction * draw["full_flops"]
        assert draw["forward_flops"] < draw["measured_flops"]
    # What is left of the budget is small, for tensors as large as these.
    assert max(draw["measured_flops"] / draw["budget_flops"] for draw in draws) > 0.8
    assert method.describe()["measured_flops"] == draws[-1]["measured_flops"]


def counted(module: TinyModule, batch: Sequence[Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        module.loss(batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("model", MODELS)
def test_importance_is_the_gain_of_a_real_step(model: str, optimizer: str, tmp_path: Path) -> None:
    """Re-computed with ``backward`` and ``step`` on a copy of the run at its second draw."""
    method = Watched(0.6, redraw=3)
    torch.manual_seed(0)
    trainer(tmp_path, [method], max_steps=4, gradient_clip_val=None).fit(
        TinyModule(model, optimizer), loader(model), loader(model, shuffle=False)
    )
    (_, _, _), (state, batch, rng) = method.draws_seen  # type: ignore[attr-defined]
    module = TinyModule(model, optimizer)
    module.load_state_dict(state["weights"])
    module.train()
    stepper = module.configure_optimizers()["optimizer"]
    stepper.load_state_dict(state["optimizer"])
    for group in stepper.param_groups:
        group["weight_decay"] = 0.0
    if model == "conv_net":  # frozen norms normalise by their statistics in the run
        planned = method.history[0][1]
        for path, layer in module.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and not {f"{path}.weight", f"{path}.bias"} & planned:
                layer.eval()

    def loss() -> Tensor:
        torch.set_rng_state(rng["torch"])
        return module.loss(batch)

    old = {name: p.detach().clone() for name, p in module.named_parameters()}
    first = loss()
    first.backward()
    stepper.step()
    module.zero_grad()
    second = loss()
    second.backward()
    expected = {
        name: -float((p.grad.double() * (p.detach() - old[name]).double()).sum())
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    assert method.importance.keys() == expected.keys()
    for name, gain in expected.items():
        assert method.importance[name] == pytest.approx(gain, rel=1e-3, abs=1e-6), name
    assert any(gain > 0 for gain in expected.values())


def test_importance_sums_to_the_drop_of_the_loss(tmp_path: Path) -> None:
    """To first order: a small step of plain SGD, whose every tensor then has a gain."""

    class Plain(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4, weight_decay=0.5)

    method = Watched(0.6, redraw="never")
    module = Plain("conv_net")
    trainer(tmp_path, [method], max_steps=2).fit(module, loader("conv_net"), loader("conv_net", shuffle=False))
    assert all(gain >= 0 for gain in method.importance.values())

    ((state, batch, rng),) = method.draws_seen  # type: ignore[attr-defined]
    module.load_state_dict(state["weights"])
    train_only(module, dict(module.named_parameters()))

    def loss() -> Tensor:
        torch.set_rng_state(rng["torch"])
        return module.double().train().loss([batch[0].double(), batch[1]])

    before = loss()
    before.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad * min(1.0, 0.5 / float(norm))  # the Trainer clips at 0.5
    drop = float(before.detach() - loss().detach())
    assert drop > 0
    assert sum(method.importance.values()) == pytest.approx(drop, rel=0.02)


def test_a_tensor_that_a_step_makes_worse_is_left_out(tmp_path: Path) -> None:
    """Ascent on the head alone: its importance is negative, and it rests although it is the cheapest of all."""

    class Half(TinyModule):
        def configure_optimizers(self) -> Any:
            head = [p for name, p in self.named_parameters() if name.startswith("model.head.")]
            rest = [p for p in self.parameters() if all(p is not h for h in head)]
            return torch.optim.SGD([{"params": rest}, {"params": head, "maximize": True}], lr=1e-3)

    method = GreenTrainer(0.7, redraw="never")
    trainer(tmp_path, [method], max_steps=1).fit(
        Half("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False)
    )
    assert method.importance["model.head.weight"] < 0
    assert "model.head.weight" not in method.trainable_names
    assert method.trainable_names


def test_never_draws_once_at_the_first_batch(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append((method.draw_index, method.history, method.trainable_names))

    method = GreenTrainer(0.6, redraw="never")
    module = TinyModule("gqa_decoder")
    trainer(tmp_path, [method, Look()]).fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert seen == [(-1, [], frozenset(dict(module.named_parameters())))]
    assert [step for step, _ in method.history] == [0]
    assert len(method.describe()["draws"]) == 1


def test_one_draw_lasts_when_the_trainer_is_given_more_epochs(tmp_path: Path) -> None:
    method = GreenTrainer(0.6, redraw="never")
    probe = Probe([method])
    module, data = TinyModule("conv_net"), loader("conv_net", shuffle=False)
    run = trainer(tmp_path, [method, probe], max_epochs=1)
    run.fit(module, loader("conv_net"), data)
    ((_, drawn),) = method.history
    run.fit_loop.max_epochs = 2
    run.fit(module, loader("conv_net"), data)
    assert len(probe.steps) == 12
    assert len(method.history) == 1
    assert all(step.planned == step.moved == drawn for step in probe.steps)


def test_an_epoch_is_the_default(tmp_path: Path) -> None:
    method = GreenTrainer(0.6)
    trainer(tmp_path, [method], max_epochs=3).fit(
        TinyModule("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False)
    )
    assert [step for step, _ in method.history] == [0, 6, 12]


def test_reports_survive_a_resume(tmp_path: Path) -> None:
    saver, whole, resumed = SaveEveryBatch(tmp_path), GreenTrainer(0.6), GreenTrainer(0.6)
    data = loader("conv_net", shuffle=False)
    trainer(tmp_path, [whole, saver]).fit(TinyModule("conv_net"), loader("conv_net"), data)
    path = saver.paths[4]
    trainer(tmp_path, [resumed]).fit(TinyModule("conv_net"), loader("conv_net"), data, ckpt_path=path)
    assert len(whole.describe()["draws"]) == 2
    assert resumed.describe() == whole.describe()
    assert resumed.importance == whole.importance


def test_always_is_paid_from_the_budget(tmp_path: Path) -> None:
    """The head's weight gradient belongs to the step, so that the tensors of the blocks get that much less."""
    method = GreenTrainer(0.5, redraw="never", scope="blocks", always=("head",))
    trainer(tmp_path, [method], max_steps=1).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    assert "model.lm_head.weight" in method.trainable_names
    description = method.describe()
    assert description["measured_flops"] == description["planned_flops"] <= description["budget_flops"]
    assert description["active_units"]


def test_beside_another_method(tmp_path: Path) -> None:
    method = GreenTrainer(0.8, redraw=2, scope=["head", "norms", "*.[23].*", "!*.[01].*"])
    lisa = LISA(1, period_steps=3, scope="*.[01].*", always=())
    trainer(tmp_path, [lisa, method]).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    assert not method.trainable_names & lisa.selectable
    assert len(method.history) == 6
    for draw in method.describe()["draws"]:
        assert draw["measured_flops"] <= draw["budget_flops"]


class Checkpointed(TinyModule):
    def __init__(self, forced: bool, reentrant: bool = False) -> None:
        super().__init__("gqa_decoder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore
        if not forced:
            self.model.disable_input_require_grads()  # type: ignore


def test_activation_checkpointing(tmp_path: Path) -> None:
    method = GreenTrainer(0.6, redraw="never")
    trainer(tmp_path, [method], max_steps=1).fit(
        Checkpointed(forced=False), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    plain = GreenTrainer(0.6, redraw="never")
    trainer(tmp_path, [plain], max_steps=1).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    ours, theirs = method.describe(), plain.describe()
    assert ours["forward_flops"] == theirs["forward_flops"]
    assert ours["full_flops"] > 1.2 * theirs["full_flops"]  # recomputation counts
    assert ours["planned_flops"] == ours["measured_flops"] <= ours["budget_flops"]


def test_inputs_made_to_require_gradients_cost_what_they_cost(tmp_path: Path) -> None:
    """Of the top alone nearly all would fit into the budget, if back-propagation stopped there."""
    scope = ["head", "*.3.*"]
    planned = []
    for forced in (False, True):
        method = GreenTrainer(0.82, redraw="never", scope=scope)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, [method], max_steps=1).fit(
                Checkpointed(forced), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
            )
        assert forced == any("disable_input_require_grads" in str(each.message) for each in caught)
        report = method.describe()
        assert report["planned_flops"] == report["measured_flops"] <= report["budget_flops"]
        planned.append((report["planned_flops"] / report["full_flops"], len(method.trainable_names)))
    (little, many), (much, few) = planned
    assert little < 0.6
    assert much > 0.78
    assert few < many


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        trainer(tmp_path, [GreenTrainer(0.6)]).fit(
            Checkpointed(forced=True, reentrant=True), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
        )


def test_a_compiled_model_is_measured_uncompiled(tmp_path: Path) -> None:
    reports = []
    for compiles in (False, True):
        module = TinyModule("conv_net")
        if compiles:
            module.model.compile(backend="aot_eager")
        method = GreenTrainer(0.6, redraw=3)
        torch.manual_seed(0)
        trainer(tmp_path, [method], limit_train_batches=8, max_epochs=1).fit(
            module, loader("conv_net"), loader("conv_net", shuffle=False)
        )
        reports.append(method.describe()["draws"])
    assert reports[0] == reports[1]
    assert len(reports[0]) == 2


def test_scoring_compiles_nothing(tmp_path: Path) -> None:
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    module = TinyModule("conv_net")
    module.model.compile(backend=backend)
    trainer(tmp_path, [GreenTrainer(0.6, redraw="never")], max_steps=2).fit(
        module, loader("conv_net"), loader("conv_net", shuffle=False)
    )
    assert len(compiled) == 1


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        GreenTrainer(fraction)


def test_a_fraction_below_the_forward_pass_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    method = GreenTrainer(0.2, redraw="never")
    with pytest.warns(UserWarning, match=r"cannot be met.*forward pass alone"):
        trainer(tmp_path, [method], max_steps=1).fit(
            TinyModule("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False)
        )
    report = method.describe()
    assert report["budget_flops"] > 0.2 * report["full_flops"]
    assert report["measured_flops"] <= report["budget_flops"]


def test_nothing_fits(tmp_path: Path) -> None:
    method = GreenTrainer(0.4, scope="model.model.layers.0")
    with pytest.raises(ConfigError, match=r"no tensor fits.*the cheapest one needs 0\.\d+"):
        trainer(tmp_path, [method]).fit(
            TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
        )


def test_a_loss_that_overflows(tmp_path: Path) -> None:
    class Overflowing(TinyModule):
        def loss(self, batch: Sequence[Tensor]) -> Tensor:
            return super().loss(batch) * torch.inf

    with pytest.raises(EffectError, match="not finite"):
        trainer(tmp_path, [GreenTrainer(0.6)]).fit(
            Overflowing("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False)
        )


def test_a_learning_rate_of_zero_is_said_to_show_nothing(tmp_path: Path) -> None:
    class Asleep(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    with pytest.warns(UserWarning, match="no tensor has any importance"):
        trainer(tmp_path, [GreenTrainer(0.6)], max_steps=1).fit(
            Asleep("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False)
        )


def test_manual_optimisation_is_refused(tmp_path: Path) -> None:
    class Manual(TinyModule):
        automatic_optimization = False  # type: ignore[assignment]

    run = trainer(tmp_path, [GreenTrainer(0.6)], accumulate_grad_batches=1, gradient_clip_val=None)
    with pytest.raises(ConfigError, match="manual optimisation"):
        run.fit(Manual("conv_net"), loader("conv_net"), loader("conv_net", shuffle=False))


def test_flags_come_back_when_scoring_fails(tmp_path: Path) -> None:
    class Failing(TinyModule):
        def loss(self, batch: Sequence[Tensor]) -> Tensor:
            raise KeyError("no such column")

    module = Failing("conv_net")
    module.model.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        trainer(tmp_path, [GreenTrainer(0.6)]).fit(module, loader("conv_net"), loader("conv_net", shuffle=False))
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["model.stem.weight"]
