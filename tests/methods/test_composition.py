"""Several methods in one run: blocks that rotate, adapters that always train, a head that thaws layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_peft import HFT, LISA, GradualUnfreezing, LoRA, RandomTuning
from lightning_peft.errors import PlanConflict, ScopeError
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import NUM_LAYERS, Probe, TinyModule, assert_same_weights, loader, trainer, weights

BASE = ["blocks", "!adapters"]


class Adapted(TinyModule):
    """A Llama whose base weights train as well as its LoRA adapters, with a head of three layers."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.model: Any = inject_adapter_in_model(config, self.model)
            self.model.lm_head = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 19))
        self.requires_grad_(True)


def lisa_with_adapters() -> list[MethodCallback]:
    return [
        LISA(1, period_steps=2, scope=BASE, always=["adapters"]),
        GradualUnfreezing(period_steps=3, scope="head", lr_decay=2.0),
    ]


def three_methods() -> list[MethodCallback]:
    return [
        GradualUnfreezing(period_steps=3, scope="head", lr_decay=2.0),
        RandomTuning(1.0, scope="adapters"),
        LISA(1, period_steps=2, scope=BASE, always=[]),
    ]


def fit(
    tmp_path: Path, methods: list[MethodCallback], *callbacks: pl.Callback, ckpt: Path | None = None, module: Any = None
) -> Any:
    torch.manual_seed(5 if ckpt is None else 77)
    module = (module or Adapted)()
    run = trainer(tmp_path, [*methods, *callbacks])
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
    return module, run


def planned(step: int, module: Adapted, blocks: list[frozenset[str]]) -> set[str]:
    """What must train in this step, told from names alone."""
    names = dict(module.named_parameters())
    adapters = {name for name in names if "lora_" in name}
    head = {name for name in names for layer in [3, 2, 0][: 1 + step // 3] if f"lm_head.{layer}." in name}
    return adapters | head | blocks[step // 2]


@pytest.mark.parametrize("make", [lisa_with_adapters, three_methods])
def test_planned_is_what_requires_grad_has_gradients_and_moves(make: Any, tmp_path: Path) -> None:
    methods = make()
    probe = Probe(methods)
    module, _ = fit(tmp_path, methods, probe)
    (lisa,) = (method for method in methods if isinstance(method, LISA))
    in_block = [
        frozenset(n for n in names if "lora_" not in n) for _, names in lisa.history
    ]  # what LISA has beside what always trains
    assert len(probe.steps) == 12
    for number, step in enumerate(probe.steps):
        assert step.planned == step.requires_grad == step.with_gradient == step.moved
        assert step.planned == planned(number, module, in_block)
    layers = [{name.split("layers.")[1][0] for name in names} for names in in_block]
    assert all(len(block) == 1 for block in layers)
    assert len({*map(frozenset, layers)}) > 2
    rates = [group["lr"] for group in module.optimizers().param_groups]
    assert len(set(rates)) == 3  # of the head's three layers; the top one's is that of blocks and adapters


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory, self.paths = directory, list[Path]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.paths.append(self.directory / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


@pytest.mark.parametrize("make", [lisa_with_adapters, three_methods])
def test_resume_is_exact(make: Any, tmp_path: Path) -> None:
    saver, methods = SaveEveryBatch(tmp_path), make()
    module, run = fit(tmp_path, methods, saver)
    expected = run.optimizers[0].state_dict()["state"]
    assert len(saver.paths) == 22
    for path in saver.paths[::4]:
        again = make()
        resumed, other = fit(tmp_path, again, ckpt=path)
        assert_same_weights(weights(resumed), weights(module))
        assert [method.history for method in again] == [method.history for method in methods]
        found = other.optimizers[0].state_dict()["state"]
        assert found.keys() == expected.keys()
        for index, state in expected.items():
            assert all(torch.equal(value, found[index][key]) for key, value in state.items())


class Plain(TinyModule):
    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model: Any = self.model
            model.lm_head = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 19))


def lora_callback() -> list[MethodCallback]:
    # The callback freezes the base: patterns, unlike roles, thaw what is in it.
    return [
        LoRA(rank=2, layers=["*.q_proj", "*.v_proj"]),
        LISA(1, period_steps=2, scope=["*.layers.*", "!adapters"], always=[]),
        GradualUnfreezing(period_steps=3, scope="*.lm_head.*", lr_decay=2.0),
    ]


def test_the_lora_callback_trains_beside_rotating_blocks_and_a_thawing_head(tmp_path: Path) -> None:
    methods, saver = lora_callback(), SaveEveryBatch(tmp_path)
    probe = Probe(methods)
    module, _ = fit(tmp_path, methods, saver, probe, module=Plain)
    adapters = {name for name, _ in module.named_parameters() if "lora_" in name}
    assert len(adapters) == NUM_LAYERS * 2 * 2
    assert len(probe.steps) == 12
    for number, step in enumerate(probe.steps):
        assert step.planned == step.requires_grad == step.with_gradient == step.moved
        assert adapters <= step.moved
        base = {name.split("layers.")[1][0] for name in step.moved - adapters if "layers." in name}
        assert len(base) == 1
        head = {int(name.split("lm_head.")[1][0]) for name in step.moved if "lm_head." in name}
        assert head == {3, 2, 0} - (set() if number >= 6 else {0} if number >= 3 else {0, 2})
    for path in saver.paths[4::9]:
        again = lora_callback()
        resumed, _ = fit(tmp_path, again, ckpt=path, module=Plain)
        assert_same_weights(weights(resumed), weights(module))
        assert [method.history for method in again] == [method.history for method in methods]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            lambda: [LISA(1, scope=BASE, always=["adapters"]), HFT(scope="adapters")],
            r"LISA\(scope=\['blocks', '!adapters'\]\) and HFT\(scope='adapters'\) both claim .*lora_",
        ),
        (
            lambda: [LISA(1, scope=BASE), GradualUnfreezing(scope="head")],  # always has the head
            r"LISA\(.*\) and GradualUnfreezing\(scope='head'\) both claim model.lm_head.0",
        ),
        (
            lambda: [
                LISA(1, scope="*.layers.[01].*", always=[]),
                HFT(scope="*.layers.[12].*"),
                GradualUnfreezing(scope="*.layers.[23].*"),
            ],
            r"LISA\(.*\) and HFT\(.*both claim .*layers.1.*; HFT\(.*\) and GradualUnfreezing\(.*both claim .*layers.2",
        ),
    ],
)
def test_overlap_names_both(methods: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanConflict, match=message):
        fit(tmp_path, methods())


def test_adapters_in_the_scope_cannot_be_always_on_too(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match=r"always='adapters' has no effect.*'!adapters'"):
        fit(tmp_path, [LISA(1, always=["adapters", "head"])])


def test_adapters_in_every_block_train_always(tmp_path: Path) -> None:
    method = LISA(NUM_LAYERS, scope=BASE, always=["adapters"])
    module, _ = fit(tmp_path, [method])
    adapters = {name for name, _ in module.named_parameters() if "lora_" in name}
    assert len(adapters) == NUM_LAYERS * 3 * 2
    assert adapters <= method.trainable_names
