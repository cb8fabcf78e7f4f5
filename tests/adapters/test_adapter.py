"""Every method through fit, validate, resume, export, another process' load and merge; and what must be refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from lightning_peft import IST, LISA, AdaLoRA, Adapter, DoRA, LoRA, MiSS, PromptTuning, load_from_checkpoint
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY
from lightning_peft.errors import BaseMismatch, ConfigError, PlanConflict, ScopeError
from tests.adapters.cases import CANNOT_MERGE, CASES, CHANGE_THE_BASE
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, loader, trainer, weights

MODEL = "gqa_decoder"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys:RuntimeWarning"),  # peft's own loader, on AdaLoRA's
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]


class SaveAll(pl.Callback):
    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory, self.options, self.count = directory, options, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.directory / f"{self.count:03d}.ckpt", **self.options)
        self.count += 1


class BuiltLate(TinyModule):
    """Builds its model in ``configure_model``."""

    def __init__(self, model: str = MODEL, **options: Any) -> None:
        super().__init__(model, **options)
        self._kind, self.model = model, None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = copy.deepcopy(_pretrained(self._kind))


def make(name: str, **options: Any) -> Adapter:
    method, config = CASES[name]
    return Adapter(method, copy.deepcopy(config), **options)


def fit(
    path: Path,
    *callbacks: Any,
    module: TinyModule | None = None,
    data: str = MODEL,
    ckpt: Path | None = None,
    **kw: Any,
) -> tuple[TinyModule, pl.Trainer]:
    torch.manual_seed(1 if ckpt is None else 9)
    module = module or TinyModule(data)
    run = trainer(path, callbacks, max_epochs=1)
    run.fit(module, loader(data), loader(data, shuffle=False), ckpt_path=ckpt)
    return module, run


def logits(model: nn.Module) -> torch.Tensor:
    x = next(iter(loader(MODEL, shuffle=False)))[0]
    with torch.no_grad():
        return model.eval()(input_ids=x, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_from_fit_to_export(name: str, tmp_path: Path) -> None:
    adapter = make(name)
    pretrained = weights(TinyModule(MODEL))
    module, run = fit(tmp_path, adapter, SaveAll(tmp_path))
    final = weights(module)
    base = {key.replace(".base_layer", "").replace("model.base_model.", "model."): v for key, v in final.items()}
    moved = {key for key, value in pretrained.items() if key in base and not torch.equal(base[key], value)}
    if name not in CHANGE_THE_BASE | {"ln_tuning", "osf"}:
        assert not moved
    trained = {n for n, p in module.named_parameters() if n in adapter.trainable_names}
    assert trained == adapter.trainable_names
    assert sum(p.numel() for n, p in module.named_parameters() if n in trained) < 0.5 * sum(
        map(torch.numel, final.values())
    )

    run.validate(module, loader(MODEL, shuffle=False), verbose=False)
    run.test(module, loader(MODEL, shuffle=False), verbose=False)
    assert_same_weights(weights(module), final)  # put in once

    points = sorted(tmp_path.glob("*.ckpt"))
    saved = torch.load(points[4], weights_only=True)
    assert not set(saved["state_dict"]) & set(saved[CHECKPOINT_KEY]["base"])
    for point in (points[1], points[4]):
        resumed, _ = fit(tmp_path, make(name), ckpt=point)
        assert_same_weights(weights(resumed), final)

    again = load_from_checkpoint(TinyModule, points[-1], model=MODEL)
    assert_same_weights(weights(again), final)

    expected = logits(module.model)
    folder = adapter.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(_pretrained(MODEL)), str(folder))
    converted = name in CHANGE_THE_BASE  # as a LoRA over the original base: equal up to rounding
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5 if converted else 0)
    if name in CANNOT_MERGE:
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge_adapters(adapter.handle)
    else:
        merged = merge_adapters(adapter.handle)
        assert {n for n, _ in merged.named_parameters()} == {n for n, _ in _pretrained(MODEL).named_parameters()}
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [TinyModule, BuiltLate])
def test_where_the_model_is_built_does_not_matter(module: type[TinyModule], tmp_path: Path) -> None:
    trained, _ = fit(tmp_path, LoRA(2), module=module(MODEL))
    expected, _ = fit(tmp_path, LoRA(2), module=TinyModule(MODEL))
    assert_same_weights(weights(trained), weights(expected))
    assert any("lora_A" in name for name in weights(trained))


def test_layers_by_scope(tmp_path: Path) -> None:
    adapter = LoRA(2, layers=["*.layers.[12].*.up_proj", "*.q_proj", "!*"][:2])
    fit(tmp_path, adapter)
    layers = {name.partition(".lora")[0].split("layers.")[1] for name in adapter.trainable_names}
    assert layers == {"1.mlp.up_proj", "2.mlp.up_proj", *(f"{i}.self_attn.q_proj" for i in range(4))}


def test_a_peft_config_is_taken_as_it_is(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True)
    adapter = Adapter(config, {"lora_alpha": 4})
    module, _ = fit(tmp_path, adapter)
    expected, _ = fit(tmp_path, Adapter("lora", {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    assert_same_weights(weights(module), weights(expected))
    assert config.lora_alpha == 8  # the user's object is not changed


def test_weights_only_checkpoint_has_no_base_and_loads_again(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LoRA(2), SaveAll(tmp_path, weights_only=True))
    path = sorted(tmp_path.glob("*.ckpt"))[-1]
    saved = torch.load(path, weights_only=True)
    assert all("lora_" in name for name in saved["state_dict"])
    adapter = LoRA(2)
    fresh = TinyModule(MODEL)
    run = trainer(tmp_path, [adapter])
    run.validate(fresh, loader(MODEL, shuffle=False), ckpt_path=path, verbose=False, weights_only=True)
    assert_same_weights(weights(fresh), weights(module))
    _, other = fit(tmp_path, LISA(1))
    other.save_checkpoint(tmp_path / "plain")
    with pytest.raises(ConfigError, match="without lightning_peft's Adapter"):
        load_from_checkpoint(TinyModule, tmp_path / "plain", model=MODEL)


def test_another_base_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, LoRA(2), SaveAll(tmp_path))
    path = sorted(tmp_path.glob("*.ckpt"))[3]
    other = TinyModule(MODEL)
    with torch.no_grad():
        other.model.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(BaseMismatch, match=r"1 of \d+ parameters differ, model.model.layers.2.mlp.up_proj"):
        fit(tmp_path, LoRA(2), module=other, ckpt=path)


def test_a_missing_adapter_tensor_is_not_forgiven(tmp_path: Path) -> None:
    fit(tmp_path, LoRA(2), SaveAll(tmp_path))
    path = sorted(tmp_path.glob("*.ckpt"))[3]
    saved = torch.load(path, weights_only=True)
    del saved["state_dict"]["model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    torch.save(saved, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj.lora_A"):
        fit(tmp_path, LoRA(2), ckpt=path)


def test_ist_over_lora_and_lisa_beside_it(tmp_path: Path) -> None:
    ist, lora = IST(0.5, score_period_steps=2, scope="adapters"), LoRA(2)
    module, _ = fit(tmp_path, lora, ist, SaveAll(tmp_path))
    assert not lora.trainable_names
    assert 0 < len(ist.trainable_names) < len(ist.selectable)
    assert all("lora" in name for name in ist.selectable)
    resumed, _ = fit(
        tmp_path, LoRA(2), IST(0.5, score_period_steps=2, scope="adapters"), ckpt=sorted(tmp_path.glob("*.ckpt"))[4]
    )
    assert_same_weights(weights(resumed), weights(module))
    lisa = LISA(1, period_steps=2, scope="*.mlp.*.weight", always=())
    lora = LoRA(2, layers="*.self_attn.*")
    fit(tmp_path, lora, lisa)
    assert all("lora" in name for name in lora.trainable_names)
    assert all("mlp" in name for name in lisa.trainable_names)


def test_two_adapters_train_together_or_one_by_one(tmp_path: Path) -> None:
    first, second = LoRA(2, adapter_name="a"), LoRA(3, adapter_name="b", layers="*.q_proj")
    module, _ = fit(tmp_path, first, second, SaveAll(tmp_path))
    assert all(".a." in name for name in first.trainable_names)
    assert all(".b." in name for name in second.trainable_names)
    assert first.handle is second.handle
    pair = (LoRA(2, adapter_name="a"), LoRA(3, adapter_name="b", layers="*.q_proj"))
    resumed, _ = fit(tmp_path, *pair, ckpt=sorted(tmp_path.glob("*.ckpt"))[4])
    assert_same_weights(weights(resumed), weights(module))
    with pytest.raises(ConfigError, match="another adapter_name"):
        fit(tmp_path, LoRA(4, adapter_name="a"), module=module)


def test_convolutions_and_frozen_running_statistics(tmp_path: Path) -> None:
    adapter = Adapter("lora", {"r": 2, "target_modules": ["conv"]})
    module, _ = fit(tmp_path, adapter, data="conv_net")
    fresh = weights(TinyModule("conv_net"))
    after = weights(module)
    for key in fresh:
        if "running" in key:
            assert torch.equal(after[key], fresh[key])
    assert not any("norm" in name or "head" in name for name in adapter.trainable_names)


def test_new_heads_inside_and_outside_the_target_train(tmp_path: Path) -> None:
    class WithHead(TinyModule):
        def __init__(self, model: str = MODEL) -> None:
            super().__init__(model)
            self.head = nn.Linear(19, 5)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            out = self.model(input_ids=batch[0], use_cache=False).logits
            return nn.functional.cross_entropy(self.head(out.mean(1)), batch[1])

    adapter = Adapter("lora", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    module, _ = fit(tmp_path, adapter, module=WithHead())
    names = adapter.trainable_names
    assert {"head.weight", "head.bias"} <= names
    assert any("modules_to_save" in name for name in names)
    untouched = WithHead()
    assert not torch.equal(module.model.lm_head.modules_to_save["default"].weight, untouched.model.lm_head.weight)


def test_adalora_reaches_its_budget_and_adds_its_regulariser(tmp_path: Path) -> None:
    options = {"initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 2, "layers": "*.q_proj"}
    adapter = AdaLoRA(6, **options)
    module, _ = fit(tmp_path, adapter)
    singular = [p for n, p in module.named_parameters() if "lora_E" in n]
    assert len(singular) == 4
    assert sum(int((p != 0).sum()) for p in singular) == 2 * 4
    plain, _ = fit(tmp_path, AdaLoRA(6, orthogonality=0.0, **options))
    product = [
        sum((p @ p.T - torch.eye(4)).norm().item() for n, p in m.named_parameters() if "lora_A" in n)
        for m in (module, plain)
    ]
    assert product[0] < product[1]


def test_the_global_random_state_is_not_used(tmp_path: Path) -> None:
    class Noise(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:
            self.value = torch.rand(1)

    values = []
    for callbacks in ([], [LoRA(2)], [LoRA(2, seed=5)]):
        noise = Noise()
        fit(tmp_path, noise, *callbacks)
        values.append(noise.value)
    assert values[0] == values[1] == values[2]


def test_mistakes_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no method 'lorra'.*'lora'"):
        Adapter("lorra")
    with pytest.raises(ConfigError, match="no option 'rank'"):
        Adapter("lora", {"rank": 8})
    with pytest.raises(ConfigError, match="LoraConfig"):
        Adapter("lora", {"r": 8, "use_dora": True, "loftq_config": {}, "init_lora_weights": "loftq"})
    with pytest.raises(ConfigError, match="both say"):
        Adapter("lora", {"target_modules": ["q"]}, layers="blocks")
    with pytest.raises(ScopeError, match=r"target='modle'.*'model'"):
        fit(tmp_path, LoRA(2, target="modle"))
    with pytest.raises(ScopeError, match="names no linear"):
        fit(tmp_path, LoRA(2, layers="*.norm"))
    with pytest.raises(ConfigError, match="peft cannot put"):
        fit(tmp_path, Adapter("lora", {"target_modules": ["no_such_layer"]}))
    with pytest.raises(PlanConflict):
        fit(tmp_path, IST(0.5, scope="adapters"), IST(0.5, scope="*lora*"), LoRA(2))
    assert DoRA(2).config["use_dora"]
    assert MiSS(2).config["r"] == 2
    assert PromptTuning(3).config["num_virtual_tokens"] == 3
