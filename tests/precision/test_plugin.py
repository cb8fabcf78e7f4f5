"""``QuantizedPrecision`` through the Trainer: order, evaluation in between, resume, checkpoints, dtypes, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import QuantizedPrecision
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import (
    BaseMismatch,
    ConfigError,
    EffectError,
    ResumeMismatch,
    ScopeError,
    UnsupportedStrategy,
)
from lightning_peft.precision import dequantize, quantize, quantized_layers
from tests.precision.tiny import LoRAModule, add_lora, loader, rows, tiny_llama, trainer

MODES = ["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"]


def fit(module: LoRAModule, plugin: Any, max_steps: int = 6, **settings: Any) -> pl.Trainer:
    run = trainer(plugin, max_steps, **settings)
    run.fit(module, loader(), loader())
    return run


def reference_losses(mode: str, steps: int = 6) -> list[float]:
    """The same training without Trainer and plugin: dequantised weights in plain linear layers, plain LoRA."""
    model = tiny_llama()
    quantize(model, mode)
    for path, layer in list(quantized_layers(model)):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(dequantize(layer), requires_grad=False)
        model.set_submodule(path, plain)
    for module in model.modules():
        module.is_loaded_in_4bit = module.is_loaded_in_8bit = False
    add_lora(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = rows()[4 * (step % 3) : 4 * (step % 3) + 4]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("mode", MODES)
def test_every_order_trains_the_same_with_evaluation_in_between(mode: str) -> None:
    expected = reference_losses(mode)
    runs = {}
    for where in ("init", "configure", "quantize_first"):
        module = LoRAModule(where)
        fit(module, QuantizedPrecision(mode), val_check_interval=2)  # validates before, between and after steps
        runs[where] = module.losses
        assert len(list(quantized_layers(module))) == 14
        assert {n for n, p in module.named_parameters() if p.requires_grad} == {
            n for n, _ in module.named_parameters() if "lora_" in n
        }
    assert runs["init"] == runs["configure"] == runs["quantize_first"]
    assert runs["init"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact_and_the_checkpoint_holds_no_base_weight(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    whole = LoRAModule()
    fit(whole, QuantizedPrecision(mode))
    half = LoRAModule()
    run = fit(half, QuantizedPrecision(mode), max_steps=3)
    run.save_checkpoint(path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("half.ckpt", "weights.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert len([key for key in state if "lora_" in key]) == 28
        assert not [key for key in state if "base_layer" in key]
        assert not [key for key, value in state.items() if not value.is_floating_point()]
    for where in ("init", "configure", "quantize_first"):
        resumed = LoRAModule(where)
        trainer(QuantizedPrecision(mode), 6).fit(resumed, loader(), loader(), ckpt_path=path)
        assert resumed.losses == whole.losses[3:]
        for (name, old), (other, new) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(old, new), name
    fresh = LoRAModule()
    validated = trainer(QuantizedPrecision(mode)).validate(fresh, loader(), ckpt_path=path, verbose=False)
    assert validated == trainer(QuantizedPrecision(mode)).validate(half, loader(), verbose=False)


def test_fit_validate_and_fit_again_quantise_once() -> None:
    module = LoRAModule()
    plugin = QuantizedPrecision("nf4")
    run = trainer(plugin, 3)
    run.fit(module, loader(), loader())
    codes = {path: layer.weight.clone() for path, layer in quantized_layers(module)}
    run.validate(module, loader(), verbose=False)
    run.fit_loop.epoch_loop.max_steps = 6
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader())
    assert len(module.losses) == 6
    assert "configure_model" not in module.__dict__
    assert all(torch.equal(layer.weight, codes[path]) for path, layer in quantized_layers(module))


def test_saved_by_model_checkpoint_during_the_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=3, save_top_k=-1)
    fit(LoRAModule(), QuantizedPrecision("nf4"), enable_checkpointing=True, callbacks=[saver])
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        assert not [key for key in torch.load(file, weights_only=True)["state_dict"] if "base_layer" in key]


def test_another_base_mode_or_scope_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    run = fit(LoRAModule(), QuantizedPrecision("nf4"), max_steps=3)
    run.save_checkpoint(path)
    for plugin, module, error, message in (
        (QuantizedPrecision("nf4"), LoRAModule(seed=2), BaseMismatch, "14 of 14 layers differ"),
        (QuantizedPrecision("fp4"), LoRAModule(), ResumeMismatch, r"mode='nf4'.*this run has mode='fp4'"),
        (
            QuantizedPrecision("nf4", skip=["embeddings", "head", "model.model.layers.1.mlp"]),
            LoRAModule(),
            ResumeMismatch,
            r"only then: model.model.layers.1.mlp.*Use the same scope and skip",
        ),
    ):
        with pytest.raises(error, match=message):
            trainer(plugin, 6).fit(module, loader(), loader(), ckpt_path=path)
        assert module.losses == []


def test_a_checkpoint_in_floating_point_is_quantised_while_it_loads(tmp_path: Path) -> None:
    plain = LoRAModule(seed=3)
    run = fit(plain, None, max_steps=3)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    module = LoRAModule(seed=1)
    trainer(QuantizedPrecision("nf4"), 3).validate(module, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    expected = tiny_llama(seed=3)
    quantize(expected, "nf4")
    codes = [layer.weight for _, layer in quantized_layers(expected)]
    assert all(
        torch.equal(layer.weight, code) for (_, layer), code in zip(quantized_layers(module), codes, strict=True)
    )


# ------------------------------------------------------------------------------------------------ dtypes


def test_bfloat16_products_float32_adapters_and_no_float32_activation_saved() -> None:
    sizes: dict[torch.dtype, int] = {}

    class Watched(LoRAModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            parameters = {p.data_ptr() for p in self.parameters()}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.is_floating_point() and tensor.data_ptr() not in parameters and tensor.ndim >= 2:
                    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return super().training_step(batch, batch_idx)

    module = Watched(dtype=torch.bfloat16)
    fit(module, QuantizedPrecision("nf4", compute_dtype="bfloat16"), max_steps=2)
    adapters = [p for n, p in module.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert {p.grad.dtype for p in adapters if p.grad is not None} <= {torch.float32}
    linear_inputs = 14 * 4 * 7 * 32  # what the 14 adapters save, had they saved float32
    assert sizes[torch.bfloat16] > linear_inputs
    in_float32 = sizes.pop(torch.float32)
    sizes.clear()
    plain = Watched(dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        fit(plain, QuantizedPrecision("nf4", compute_dtype="float32"), max_steps=2)
    # norms and the loss work in float32; the adapters' inputs are no longer among what is saved
    assert sizes[torch.float32] - in_float32 > linear_inputs


def test_adapters_get_float32_unless_kept() -> None:
    for adapter_dtype, expected in (("float32", torch.float32), ("keep", torch.bfloat16)):
        module = LoRAModule(dtype=torch.bfloat16)
        plugin = QuantizedPrecision("nf4", compute_dtype="bfloat16", adapter_dtype=adapter_dtype)
        run = trainer(plugin, 1)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        run.fit(module, loader(), loader())
        dtypes = {p.dtype for n, p in module.named_parameters() if "lora_" in n}
        assert dtypes == {expected}
        states = run.optimizers[0].state.values()
        assert {s["exp_avg"].dtype for s in states} == {expected}


# ------------------------------------------------------------------------------------------------ errors


def test_mistakes_in_arguments_name_the_nearest() -> None:
    for settings, message in (
        ({"mode": "nf5"}, "Did you mean 'nf4'"),
        ({"compute_dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"adapter_dtype": "float"}, "Did you mean 'float32'"),
        ({"backend": "torchoa"}, "Did you mean 'torchao'"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantizedPrecision(**settings)
    with pytest.raises(ScopeError, match=r"Did you mean 'model.model.layers.0"):
        fit(LoRAModule(), QuantizedPrecision(skip=["model.model.layer.0"]))


def test_nothing_left_to_train_is_said_before_the_optimizer_is_built() -> None:
    module = LoRAModule("bare")
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        fit(module, QuantizedPrecision("nf4"))


def test_an_adapter_that_something_else_quantised_is_found() -> None:
    module = LoRAModule()
    layer = module.model.model.layers[0].self_attn.q_proj.lora_A
    quantize(layer, "nf4", skip=())
    assert is_quantized(layer["default"].weight)
    with pytest.raises(EffectError, match=r"q_proj.lora_A.default.weight is an adapter's weight"):
        fit(module, QuantizedPrecision("nf4"))


def test_without_the_plugin_in_a_trainer_nothing_is_done() -> None:
    plugin = QuantizedPrecision("nf4")
    module = LoRAModule()
    fit(module, None, max_steps=1)
    assert not list(quantized_layers(module))
    assert plugin.mode == "nf4"


def test_without_the_entry_point_a_run_warns_and_trains_all_the_same() -> None:
    from lightning_peft.precision.plugin import _Companion

    module = LoRAModule()
    run = trainer(QuantizedPrecision("nf4"), 2)
    run.callbacks = [callback for callback in run.callbacks if not isinstance(callback, _Companion)]
    with pytest.warns(UserWarning, match="has not found this package's entry point"):
        run.fit(module, loader(), loader())
    other = LoRAModule()
    fit(other, QuantizedPrecision("nf4"), max_steps=2)
    assert module.losses == other.losses


def test_a_strategy_that_has_not_been_shown_right_is_refused() -> None:
    module: Any = SimpleNamespace(_trainer=SimpleNamespace(strategy=object()))
    with pytest.raises(UnsupportedStrategy, match="not been shown to be right under object"):
        QuantizedPrecision("nf4")._check_strategy(module)


def test_companion_comes_by_the_entry_point_alone() -> None:
    from lightning_peft.precision.plugin import _Companion

    plugin = QuantizedPrecision("nf4")
    run = trainer(plugin)
    assert sum(isinstance(callback, _Companion) for callback in run.callbacks) == 1
