"""QLoRA: adapters on quantised layers, through the Trainer and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_peft import Adapter, CausalLM, QLoRA, QuantizedPrecision
from lightning_peft.cli import main
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.precision import dequantize, merge_adapter, quantize, quantized_layers
from tests.models.tiny_models import LLAMA, save_tokenizer
from tests.precision.tiny import LoRAModule, add_lora, loader, rows, tiny_llama, trainer

ROOT = Path(__file__).parents[2]


def batches(num: int = 12) -> ResumableDataLoader:
    from torch.utils.data import TensorDataset

    return ResumableDataLoader(TensorDataset(rows(num)), batch_size=2, shuffle=True, seed=3)


def run(module: LoRAModule, steps: int, ckpt: Path | None = None, plugin: Any = None, **settings: Any) -> pl.Trainer:
    method = QLoRA(rank=4, alpha=8, **settings)
    fit = trainer(plugin or QuantizedPrecision("nf4"), steps, callbacks=[method])
    fit.fit(module, batches(), loader(), ckpt_path=ckpt)
    return fit


def test_adapters_alone_train_and_the_base_keeps_its_bits() -> None:
    module = LoRAModule("bare")
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    expected = tiny_llama()
    quantize(expected, "nf4")
    fit = run(module, 5)
    method = fit.callbacks[0]
    assert isinstance(method, QLoRA)
    assert len(method.trainable_names) == 28
    assert all("lora_" in name for name in method.trainable_names)
    for (_, layer), (_, other) in zip(quantized_layers(module), quantized_layers(expected), strict=True):
        assert torch.equal(layer.weight, other.weight)
    for name, parameter in module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
        elif "lora_B" in name:
            assert parameter.abs().max() > 0
    assert {id(p) for g in fit.optimizers[0].param_groups for p in g["params"]} == {
        id(p) for n, p in module.named_parameters() if "lora_" in n
    }


def test_is_lora_of_peft_on_the_dequantised_base() -> None:
    """Against plain peft on plain linear layers that hold the dequantised weights."""
    module = LoRAModule("bare")
    run(module, 4, dropout=0.0)
    model = tiny_llama()
    quantize(model, "nf4")
    for path, layer in list(quantized_layers(model)):
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = torch.nn.Parameter(dequantize(layer), requires_grad=False)
        model.set_submodule(path, plain)
    for part in model.modules():
        part.is_loaded_in_4bit = False
    with torch.random.fork_rng():
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 28
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for (ids,) in [batch for _, batch in zip(range(4), batches(), strict=False)]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.losses == pytest.approx(losses, abs=2e-5)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_adapter_callback_over_a_quantised_base_resumes(mode: Any, tmp_path: Path) -> None:
    def fit(module: LoRAModule, steps: int, ckpt: Path | None = None) -> pl.Trainer:
        method = Adapter("lora", {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1})
        done = trainer(QuantizedPrecision(mode), steps, callbacks=[method])
        done.fit(module, batches(), loader(), ckpt_path=ckpt)
        return done

    torch.manual_seed(0)
    whole, half, resumed = (LoRAModule("bare") for _ in range(3))
    fit(whole, 9)
    torch.manual_seed(0)
    fit(half, 4).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 9, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]
    assert len(list(quantized_layers(resumed))) == 14


@pytest.mark.parametrize("where", ["bare", "configure_bare"])
def test_resume_in_the_middle_of_an_epoch_is_exact(where: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = LoRAModule("bare")
    run(whole, 9)
    torch.manual_seed(0)
    half = LoRAModule("bare")
    run(half, 4).save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=False)
    assert not [key for key in state["state_dict"] if "base_layer.weight" in key]
    resumed = LoRAModule(where)
    run(resumed, 9, ckpt=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]  # dropout included
    for (name, old), (_, new) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(old, new), name


def test_chosen_layers_and_a_head_beside() -> None:
    module = LoRAModule("bare")
    fit = run(module, 3, layers=["*.q_proj", "model.model.layers.1.mlp"], always=["head"])
    method = fit.callbacks[0]
    assert isinstance(method, QLoRA)
    adapted = {name.split(".lora_")[0] for name in method.trainable_names if "lora_" in name}
    assert adapted == {f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {
        f"model.model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert "model.lm_head.weight" in method.trainable_names


def test_fit_then_validate_then_merge() -> None:
    module = LoRAModule("bare")
    fit = run(module, 3)
    with torch.no_grad():
        before = fit.validate(module, loader(), verbose=False)
    assert len(merge_adapter(module, dequantize=True)) == 14
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in LoRAModule("bare").named_parameters()}
    after = trainer(None).validate(module, loader(), verbose=False)
    assert after[0]["val_loss"] == pytest.approx(before[0]["val_loss"], abs=1e-5)


def test_transformers_quantised_model_needs_no_plugin(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    losses = []
    for plugin in (QuantizedPrecision("nf4"), None):
        module = LoRAModule("bare")
        module.model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        module.model.train()
        torch.manual_seed(0)
        fit = trainer(plugin, 3, callbacks=[QLoRA(rank=4, alpha=8)], limit_val_batches=0)
        fit.fit(module, batches(), loader())
        losses.append(module.losses)
    plain = LoRAModule("bare")
    torch.manual_seed(0)
    run(plain, 3)
    assert losses[0] == losses[1] == pytest.approx(plain.losses, abs=1e-6)


def test_mistakes() -> None:
    for settings, message in (
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            QLoRA(**settings)
    with pytest.raises(ConfigError, match="no layer of the model is quantised"):
        trainer(None, 2, callbacks=[QLoRA(4)]).fit(LoRAModule("bare"), batches(), loader())
    with pytest.raises(ScopeError, match=r"names no quantised linear layer.*layers.0.self_attn.q_proj"):
        run(LoRAModule("bare"), 2, layers=["model.model.layers.0.self_attn.q_prj"])
    model = tiny_llama()
    quantize(model, "nf4")
    assert len(QLoRA(4).inject(model)) == 14
    assert len(QLoRA(4).inject(model)) == 14
    with pytest.raises(ConfigError, match="The model has adapters of"):
        QLoRA(8).inject(model)


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})).save_pretrained(folder)
    save_tokenizer(folder)
    data = tmp_path / "pairs.jsonl"
    records = [{"prompt": f"w{i % 24} w{(i + 1) % 24}", "response": f"w{(i + 2) % 24}"} for i in range(40)]
    data.write_text("\n".join(json.dumps(record) for record in records))
    return folder, data


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_recipe_runs_and_resumes_on_the_command_line(
    pairs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = pairs
    monkeypatch.chdir(tmp_path)
    common = [
        "fit",
        f"--config={ROOT / 'configs/recipes/qlora.yaml'}",
        f"--model.model_name_or_path={folder}",
        f"--data.train_path={data}",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=-1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=3",
        "--method.rank=4",
    ]
    assert main([*common, "--trainer.max_steps=4"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)
    adapters = {key: value for key, value in saved["state_dict"].items() if "lora_" in key}
    assert len(adapters) == 28
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    assert not [key for key in saved["state_dict"] if "base_layer.weight" in key]
    assert saved["QuantizedPrecision"]["mode"] == "nf4-dq"
    assert saved["global_step"] == 3  # after the validation
    assert main([*common, "--trainer.max_steps=6", f"--ckpt_path={checkpoint}"]) == 0


def test_overlays_compose(pairs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, data = pairs
    names = [
        "models/causal_lm",
        "data/prompt_response",
        "precision/nf4",
        "methods/qlora",
        "optimizers/adamw_8bit",
    ]
    args = ["fit", *(f"--config={ROOT / 'configs' / name}.yaml" for name in names)]
    args += [f"--model.model_name_or_path={folder}", f"--data.train_path={data}"]
    assert main([*args, "--trainer.plugins.mode=fp4", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    plugin = config["trainer"]["plugins"]
    plugin = plugin[0] if isinstance(plugin, list) else plugin
    assert plugin["class_path"].endswith("QuantizedPrecision")
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "bitsandbytes.optim.PagedAdamW8bit"
    assert config["trainer"]["callbacks"][0]["class_path"].endswith("QLoRA")


def test_ready_model_in_python() -> None:
    model = CausalLM(config={**LLAMA, "vocab_size": 27}, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    batch = {"input_ids": rows(4), "labels": rows(4), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    fit = trainer(QuantizedPrecision("nf4-dq"), 3, callbacks=[QLoRA(4)])
    from torch.utils.data import DataLoader

    data = DataLoader([0] * 3, batch_size=1, collate_fn=lambda _: batch)  # pyright: ignore[reportArgumentType]
    fit.fit(model, data, data)
    assert fit.global_step == 3
    assert len(list(quantized_layers(model))) == 14


def test_adapters_of_ones_own_keep_their_names() -> None:
    module = LoRAModule("bare")
    add_lora(module.model)
    names = {name for name, _ in module.named_parameters()}
    trainer(QuantizedPrecision("nf4"), 1).fit(module, batches(), loader())
    assert {name for name, _ in module.named_parameters()} == names
