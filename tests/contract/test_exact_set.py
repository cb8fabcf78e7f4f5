"""planned = requires_grad = with gradient = moved, and nothing else moves, in every optimizer step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contract.harness import (
    MODELS,
    ROWS,
    Probe,
    TinyModule,
    assert_same_weights,
    buffer_owners,
    loader,
    trainer,
    weights,
)

STEPS = 12  # two epochs of 11 micro-batches, accumulated in pairs


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "all"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS)
def test_each_step_moves_exactly_the_plan(row: str, model: str, optimizer: str, filtered: bool, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    probe = Probe(methods)
    module = TinyModule(model, optimizer, filtered)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    trainer(tmp_path, [*methods, probe], num_sanity_val_steps=1).fit(
        module, loader(model), loader(model, shuffle=False)
    )

    assert len(probe.steps) == STEPS
    ever = set()
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient == step.moved
        ever |= step.planned
        for name in step.moved_buffers:
            owners = buffer_owners(module)[name]
            assert set(owners) & step.planned, f"{name} of a frozen norm moved"
    assert 0 < len(probe.steps[0].planned) < len(flags)
    for method in methods:
        assert method.draw_index == len(method.history) - 1
    assert max(len(method.history) for method in methods) == ROWS[row].draws(STEPS)
    assert frozenset().union(*(names for method in methods for _, names in method.history)) == ever
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags


KEEPING = [name for name, row in ROWS.items() if any(m.state == "keep" and not m.is_static for m in row.make())]


@pytest.mark.parametrize("row", [name for name in ROWS if name not in KEEPING])
def test_optimizer_state_is_bounded_by_the_plan(row: str, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    probe = Probe(methods)
    trainer(tmp_path, [*methods, probe]).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    for step in probe.steps:
        assert step.state_names == step.planned


@pytest.mark.parametrize("row", KEEPING)
def test_kept_state_only_grows(row: str, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    probe = Probe(methods)
    trainer(tmp_path, [*methods, probe]).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    trained: set[str] = set()
    for step in probe.steps:
        trained |= step.planned
        assert step.state_names == trained
    assert len(trained) > len(probe.steps[0].planned)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.make_full is not None])
def test_selecting_all_equals_full_fine_tuning(row: str, model: str, tmp_path: Path) -> None:
    make_full = ROWS[row].make_full
    assert make_full is not None
    results = []
    for callbacks in (make_full(), []):
        torch.manual_seed(0)
        module = TinyModule(model)
        trainer(tmp_path, callbacks).fit(module, loader(model), loader(model, shuffle=False))
        results.append(weights(module))
    assert_same_weights(*results)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS)
def test_other_stages_change_nothing(row: str, model: str, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    module = TinyModule(model)
    run = trainer(tmp_path, methods)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    data = loader(model, shuffle=False)

    def stages() -> None:
        state = weights(module)
        histories = [method.history for method in methods]
        run.validate(module, data, verbose=False)
        run.test(module, data, verbose=False)
        run.predict(module, data)
        assert_same_weights(weights(module), state)
        assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
        assert [method.history for method in methods] == histories

    stages()
    run.fit(module, loader(model), data)
    stages()


@pytest.mark.parametrize("row", ROWS)
def test_second_fit_starts_the_same_schedule(row: str, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    results, histories = [], []
    for _ in range(2):
        torch.manual_seed(0)
        module = TinyModule("gqa_decoder")
        trainer(tmp_path, methods).fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
        results.append(weights(module))
        histories.append([method.history for method in methods])
    assert_same_weights(*results)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("row", ROWS)
def test_fit_goes_on_when_the_trainer_is_given_more_epochs(row: str, tmp_path: Path) -> None:
    methods = ROWS[row].make()
    probe = Probe(methods)
    module = TinyModule("gqa_decoder")
    run = trainer(tmp_path, [*methods, probe], max_epochs=1)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    first = [method.history for method in methods]
    run.fit_loop.max_epochs = 2
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert len(probe.steps) == STEPS
    for method, history in zip(methods, first, strict=True):
        assert method.history[: len(history)] == history
    assert max(len(method.history) for method in methods) == ROWS[row].draws(STEPS)
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.moved
