"""Several adapters on one model: which train, which take part in the forward pass, and switching between them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lightning_peft import IST, Adapter, LoRA, load_from_checkpoint, merge_adapters
from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY
from lightning_peft.errors import ConfigError, ScopeError
from tests.adapters.test_adapter import MODEL, SaveAll, fit, logits
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]

OPTIONS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
"""B starts at random, so that an adapter that takes part is seen in the outputs."""


class Sets(pl.Callback):
    """In every step: names with a gradient, in the optimizer, and that have moved."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = dict(module.named_parameters())
        self.flags = {name for name, p in named.items() if p.requires_grad}
        self.gradients = {name for name, p in named.items() if p.grad is not None}
        self.held = {name for name, p in named.items() if id(p) in held}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.moved = {name for name, p in module.named_parameters() if not torch.equal(p, self.before[name])}


def make(name: str, **options: Any) -> Adapter:
    return Adapter("lora", dict(OPTIONS), adapter_name=name, seed=ord(name[0]), **options)


def of(adapter: str, module: TinyModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(module).items() if f".{adapter}." in name}


def expected(*active: str) -> torch.Tensor:
    """Logits of the base with adapters as they start, put in by peft alone."""
    model: Any = copy.deepcopy(_pretrained(MODEL))
    for index, name in enumerate(active):
        torch.manual_seed(ord(name[0]))
        config = LoraConfig(**copy.deepcopy(OPTIONS))  # type: ignore[arg-type]
        if index:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    if active:
        model.base_model.set_adapter(list(active))
    return logits(model)


def put_in(path: Path, *adapters: Any) -> TinyModule:
    module = TinyModule(MODEL)
    trainer(path, adapters).validate(module, loader(MODEL, shuffle=False), verbose=False)
    return module


@pytest.mark.parametrize(
    ("first", "second"),
    [({"train": False}, {}), ({"train": False, "active": False}, {}), ({}, {"train": False}), ({}, {})],
    ids=["frozen_and_trained", "inactive_and_trained", "trained_and_frozen", "both"],
)
def test_what_is_planned_trains_and_nothing_else(first: Any, second: Any, tmp_path: Path) -> None:
    def pair() -> tuple[Adapter, Adapter]:
        return make("a", **first), make("b", **second)

    start = put_in(tmp_path, *pair())
    active = [name for name, options in (("a", first), ("b", second)) if options.get("active", True)]
    assert torch.equal(logits(start.model), expected(*active))
    assert not torch.equal(expected("a", "b"), expected("b"))
    adapters, sets = pair(), Sets()
    module, _ = fit(tmp_path, *adapters, sets, SaveAll(tmp_path))
    trained = {name for name, options in (("a", first), ("b", second)) if options.get("train", True)}
    planned = frozenset().union(*(adapter.trainable_names for adapter in adapters))
    assert planned == sets.flags == sets.gradients == sets.held == sets.moved
    assert planned == {name for name in weights(module) for key in trained if f".{key}." in name}
    for key in {"a", "b"} - trained:
        assert_same_weights(of(key, module), of(key, start))

    point = sorted(tmp_path.glob("*.ckpt"))[4]
    saved = torch.load(point, weights_only=True)
    assert {name for name in saved["state_dict"] if ".a." in name or ".b." in name} == set(saved["state_dict"])
    assert of("a", module).keys() | of("b", module).keys() == saved["state_dict"].keys()
    assert [entry["active"] for entry in saved[CHECKPOINT_KEY]["adapters"]] == ["a" in active, "b" in active]
    resumed, _ = fit(tmp_path, *pair(), ckpt=point)
    assert_same_weights(weights(resumed), weights(module))
    again = load_from_checkpoint(TinyModule, sorted(tmp_path.glob("*.ckpt"))[-1], model=MODEL)
    assert_same_weights(weights(again), weights(module))
    assert torch.equal(logits(again.model), logits(module.model))
    merged = merge_adapters(adapters[0].handle)
    torch.testing.assert_close(logits(merged), logits(again.model), rtol=1e-4, atol=1e-5)


def test_switching_between_runs(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, make("a"), make("b", train=False, active=False))
    trained_a = of("a", module)
    fit(tmp_path, make("a", train=False, active=False), make("b"), module=module)
    assert_same_weights(of("a", module), trained_a)
    trained_b = of("b", module)
    first, second = make("a", train=False), make("b", train=False)
    run = trainer(tmp_path, [first, second])
    outputs = {}
    for active in (("a", "b"), ("a",), ("b",), ()):
        first.active, second.active = "a" in active, "b" in active
        run.validate(module, loader(MODEL, shuffle=False), verbose=False)
        outputs[active] = logits(module.model)
        module.train()
    assert torch.equal(outputs[()], logits(copy.deepcopy(_pretrained(MODEL))))
    for name, adapter in (("a", first), ("b", second)):
        folder = adapter.export(tmp_path / "peft")
        theirs = PeftModel.from_pretrained(copy.deepcopy(_pretrained(MODEL)), str(folder))
        assert torch.equal(logits(theirs), outputs[(name,)])
    assert not torch.equal(outputs["a", "b"], outputs[("a",)])
    assert_same_weights(of("b", module), trained_b)
    first.active = second.active = second.train = True
    fit(tmp_path, first, second, module=module)
    assert second.trainable_names
    assert not first.trainable_names
    assert_same_weights(of("a", module), trained_a)


def test_a_saved_adapter_stays_as_it_is_under_a_new_one(tmp_path: Path) -> None:
    old = make("a")
    module, _ = fit(tmp_path, old)
    folder = str(old.export(tmp_path / "saved"))
    frozen, new = Adapter(folder, adapter_name="old", train=False), LoRA(2, layers="*.q_proj", adapter_name="new")
    stacked, _ = fit(tmp_path, frozen, new)
    renamed = {name.replace(".old.", ".a."): value for name, value in of("old", stacked).items()}
    assert_same_weights(renamed, of("a", module))
    assert new.trainable_names == set(of("new", stacked))


def test_other_methods_leave_a_frozen_adapter_alone(tmp_path: Path) -> None:
    ist, frozen = IST(0.5, score_period_steps=2, scope="adapters"), make("a", train=False)
    module, _ = fit(tmp_path, frozen, make("b"), ist)
    assert ist.selectable == set(of("b", module))


def test_an_allocating_method_is_not_driven_while_frozen(tmp_path: Path) -> None:
    class WithHead(TinyModule):
        def __init__(self) -> None:
            super().__init__(MODEL)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss(batch) * self.scale

    options = {"init_r": 4, "target_r": 2, "total_step": 6, "tfinal": 1, "target_modules": ["q_proj"]}
    adapter, module = Adapter("adalora", options, train=False), WithHead()
    fit(tmp_path, adapter, module=module)
    assert adapter.trainable_names == {"scale"}
    ranks = [p for name, p in module.named_parameters() if "lora_E" in name]
    assert all(len(p) == 4 for p in ranks)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train=False too"):
        make("a", active=False)
    prompt = Adapter("prompt_tuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, train=False, active=False)
    with pytest.raises(ConfigError, match="always active"):
        put_in(tmp_path, prompt)
    with pytest.raises(ScopeError, match="nothing of the model trains"):
        fit(tmp_path, make("a", train=False))
