"""Adapters in files: import, conversion of starts that changed the base, merged Hugging Face folders, the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_peft import Adapter, LoRA, QuantizedPrecision, load_from_checkpoint, merge_adapters
from lightning_peft.adapters.conversion import initial_factors, weights_before
from lightning_peft.adapters.injection import injected
from lightning_peft.cli import main
from lightning_peft.errors import BaseMismatch, ConfigError
from tests.adapters.test_adapter import MODEL, SaveAll, fit, logits, make
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys:RuntimeWarning"),  # peft's own loader, on AdaLoRA's
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]

KASA = {"r": 2, "kasa_config": {}, "target_modules": ["q_proj", "v_proj"]}


def pretrained() -> Any:
    return copy.deepcopy(_pretrained(MODEL))


def validate(path: Path, adapter: Any, module: TinyModule) -> None:
    trainer(path, [adapter]).validate(module, loader(MODEL, shuffle=False), verbose=False)


# ---------------------------------------------------------------------- import


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3", "vera", "miss", "oft", "lokr", "prompt_tuning"])
def test_an_exported_adapter_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    adapter = make(name)
    module, _ = fit(tmp_path, adapter)
    folder = adapter.export(tmp_path / "saved")
    again, fresh = Adapter.from_pretrained(folder), TinyModule(MODEL)
    assert again.method == adapter.method
    validate(tmp_path, again, fresh)
    assert torch.equal(logits(fresh.model), logits(module.model))
    if name != "adalora":  # peft leaves out the ranks that AdaLoRA has taken away
        assert_same_weights(weights(fresh), weights(module))
    second = again.export(tmp_path / "again")
    first, then = load_file(folder / "adapter_model.safetensors"), load_file(second / "adapter_model.safetensors")
    assert first.keys() == then.keys()
    assert all(torch.equal(first[key], then[key]) for key in first)


def test_native_and_peft_written_adapters_train_on(tmp_path: Path) -> None:
    base = pretrained()
    theirs = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs)
    adapter, module = Adapter(str(tmp_path / "theirs"), {"lora_dropout": 0.1}), TinyModule(MODEL)
    validate(tmp_path, adapter, module)
    assert torch.equal(logits(module.model), expected)
    fit(tmp_path, adapter, module=module.train())
    assert adapter.trainable_names
    assert not torch.equal(logits(module.model), expected)

    xs = Adapter("lora_xs", {"r": 2, "target_modules": ["q_proj"], "init_std": 0.1})
    trained, _ = fit(tmp_path, xs)
    fresh = TinyModule(MODEL)
    validate(tmp_path, Adapter(str(xs.export(tmp_path / "xs"))), fresh)
    assert_same_weights(weights(fresh), weights(trained))


def test_training_from_a_folder_resumes_exactly_and_its_checkpoint_wins(tmp_path: Path) -> None:
    first = make("lora")
    fit(tmp_path, first)
    folder = str(first.export(tmp_path / "saved"))
    module, _ = fit(tmp_path, Adapter(folder), SaveAll(tmp_path))
    point = sorted(tmp_path.glob("*.ckpt"))[4]
    resumed, _ = fit(tmp_path, Adapter(folder), ckpt=point)
    assert_same_weights(weights(resumed), weights(module))
    again = load_from_checkpoint(TinyModule, sorted(tmp_path.glob("*.ckpt"))[-1], model=MODEL)
    assert_same_weights(weights(again), weights(module))


def test_mistakes_about_folders_name_the_nearest(tmp_path: Path) -> None:
    adapter = LoRA(2)
    fit(tmp_path, adapter)
    folder = adapter.export(tmp_path / "adapters" / "sums")
    with pytest.raises(ConfigError, match=r"no adapter folder .*smus.*Did you mean .*sums"):
        Adapter(str(folder.with_name("smus")))
    with pytest.raises(ConfigError, match=r"has no adapter_config.json\. Adapters lie in '.*sums'"):
        Adapter(str(folder.parent))
    (folder / "adapter_config.json").rename(folder / "adapter-config.json")
    with pytest.raises(ConfigError, match=r"Is it 'adapter-config.json'\?"):
        Adapter(str(folder))
    (folder / "adapter-config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ConfigError, match="both say which layers"):
        Adapter(str(folder), layers="blocks")
    with pytest.raises(BaseMismatch, match="does not fit"):
        validate(tmp_path, Adapter(str(folder), {"r": 3}), TinyModule(MODEL))
    with pytest.raises(BaseMismatch, match=r"tensors are missing"):
        validate(tmp_path, Adapter(str(folder), {"use_dora": True}), TinyModule(MODEL))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_modell.safetensors")
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors. Did you mean 'adapter_modell"):
        Adapter(str(folder))
    with pytest.raises(ConfigError, match=r"no method 'lorra'"):
        Adapter("lorra")


def test_the_base_that_the_folder_names(tmp_path: Path) -> None:
    adapter = LoRA(2)
    fit(tmp_path, adapter)
    folder = adapter.export(tmp_path / "saved")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "org/base"}))
    named = TinyModule(MODEL)
    named.model.name_or_path = "elsewhere/base"
    validate(tmp_path, Adapter(str(folder)), named)
    other = TinyModule(MODEL)
    other.model.name_or_path = "org/other"
    with pytest.raises(BaseMismatch, match="trained on 'org/base', and 'model' is 'org/other'"):
        validate(tmp_path, Adapter(str(folder)), other)
    other = TinyModule(MODEL)
    other.model.name_or_path = "org/other"
    validate(tmp_path, Adapter(str(folder), {"base_model_name_or_path": "org/other"}), other)


# ---------------------------------------------------------------------- starts that changed the base


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "lora_alpha": 3},
        {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        KASA,
    ],
    ids=["pissa", "pissa_niter_rslora", "olora_patterns", "corda", "lora_ga", "kasa"],
)
def test_what_changed_the_base_is_exported_as_a_lora_over_the_original(options: dict[str, Any], tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], **copy.deepcopy(options)}
    adapter = Adapter("lora", config)
    module, _ = fit(tmp_path, adapter, SaveAll(tmp_path))
    expected, original = logits(module.model), pretrained()
    folder = adapter.export(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(original, str(folder))
    scale = (expected - logits(pretrained())).abs().max()
    assert scale > 1e-2 * expected.abs().max()
    assert (logits(loaded) - expected).abs().max() < 1e-5 * expected.abs().max()
    with loaded.disable_adapter():  # the base is the original one
        assert torch.equal(logits(loaded), logits(pretrained()))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    shapes = {key: value.shape for key, value in load_file(folder / "adapter_model.safetensors").items()}
    assert all(shape[0] in (4, 6) for key, shape in shapes.items() if "lora_A" in key)

    again = Adapter(str(folder))  # and comes back as a LoRA that anyone can train on
    fresh = TinyModule(MODEL)
    validate(tmp_path, again, fresh)
    torch.testing.assert_close(logits(fresh.model), expected, rtol=1e-4, atol=1e-5)
    rebuilt = load_from_checkpoint(TinyModule, sorted(tmp_path.glob("*.ckpt"))[-1], model=MODEL)
    twin = injected(rebuilt)["model", "default"].initial_factors
    own = injected(module)["model", "default"].initial_factors
    assert own.keys() == twin.keys()
    assert all(torch.equal(own[path][i], twin[path][i]) for path in own for i in (0, 1))


def test_factors_are_what_the_base_lost() -> None:
    for options in ({"init_lora_weights": "pissa", "lora_alpha": 5}, KASA):
        base = pretrained()
        values = {"r": 2, "target_modules": ["q_proj", "v_proj"], **copy.deepcopy(options)}
        before = weights_before(base, values)
        assert bool(before) == ("kasa_config" in options)
        handle: Any = get_peft_model(base, LoraConfig(**values))
        factors = initial_factors(handle, "default", before)
        assert len(factors) == 8
        for path, (lora_A, lora_B) in factors.items():
            original = _pretrained(MODEL).get_submodule(path).weight
            now = base.get_submodule(path)
            gone = now.scaling["default"] * lora_B @ lora_A
            torch.testing.assert_close(now.base_layer.weight + gone, original, rtol=1e-5, atol=1e-6)
            assert gone.norm() > 1e-3


def test_what_cannot_be_converted_is_refused_with_the_reason(tmp_path: Path) -> None:
    adapter = Adapter("lora", {"r": 2, "init_lora_weights": "pissa", "use_dora": True, "target_modules": ["q_proj"]})
    fit(tmp_path, adapter)
    with pytest.raises(ConfigError, match=r"pissa.*with DoRA the adapter is no sum"):
        adapter.export(tmp_path / "saved")
    plain = make("pissa")
    fit(tmp_path, plain)
    assert plain._injected is not None
    plain._injected.initial_factors.clear()
    with pytest.raises(ConfigError, match="factors that it started from are not known"):
        plain.export(tmp_path / "saved")
    theirs = get_peft_model(pretrained(), LoraConfig(init_lora_weights="pissa_niter_4"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match=r"'pissa_niter_4', which has changed the base"):
        Adapter(str(tmp_path / "theirs"))
    exact = get_peft_model(pretrained(), LoraConfig(init_lora_weights="pissa"))
    exact.save_pretrained(str(tmp_path / "exact"))
    module = TinyModule(MODEL)
    validate(tmp_path, Adapter(str(tmp_path / "exact")), module)  # peft's exact one starts the same way again
    torch.testing.assert_close(logits(module.model), logits(pretrained()), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- merged folders


class Tied(TinyModule):
    """Input and output embeddings are one tensor."""

    def __init__(self, model: str = MODEL) -> None:
        super().__init__(model)
        self.model = AutoModelForCausalLM.from_config(_tied_config())
        self.model.load_state_dict(_pretrained(MODEL).state_dict(), strict=False)
        self.model.tie_weights()


def _tied_config() -> Any:
    config = copy.deepcopy(_pretrained(MODEL).config)
    config.tie_word_embeddings = True
    return config


@pytest.mark.parametrize(
    ("options", "stays_tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, True),
    ],
    ids=["untouched", "head", "embeddings", "both", "saved_head", "tokens"],
)
def test_a_merged_folder_computes_the_same_with_ties_right(
    options: dict[str, Any], stays_tied: bool, tmp_path: Path
) -> None:
    module = Tied()
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    adapter = Adapter("lora", {"r": 2, "init_lora_weights": False, **options})
    fit(tmp_path, adapter, module=module)
    expected = logits(module.model)
    merged: Any = merge_adapters(adapter.handle)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings is stays_tied
    merged.save_pretrained(str(tmp_path / "merged"))
    again, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(merged))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is stays_tied
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not stays_tied


def test_shared_embeddings_of_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    x = torch.arange(6)[None]
    for targets in (["q"], ["q", "lm_head"], ["shared"]):
        model: Any = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=True)).eval()
        handle: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
        if targets == ["shared"]:
            with pytest.raises(ConfigError, match="ties them again when it is loaded"):
                merge_adapters(handle)
            continue
        with torch.no_grad():
            expected = handle(input_ids=x, decoder_input_ids=x).logits
            merge_adapters(handle).save_pretrained(str(tmp_path / targets[-1]))  # type: ignore[operator]
            again: Any = T5ForConditionalGeneration.from_pretrained(str(tmp_path / targets[-1]))
            torch.testing.assert_close(again(input_ids=x, decoder_input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_quantised_base_is_merged_after_dequantising_only(tmp_path: Path) -> None:
    adapter, module = LoRA(2), TinyModule(MODEL)
    run = trainer(tmp_path, [adapter], max_epochs=1, plugins=[QuantizedPrecision("int8")])
    run.fit(module, loader(MODEL), loader(MODEL, shuffle=False))
    expected = logits(module.model)
    with pytest.raises(ConfigError, match="dequantize=True"):
        merge_adapters(adapter.handle)
    merged: Any = merge_adapters(adapter.handle, dequantize=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(str(tmp_path / "merged"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))), logits(merged))


# ---------------------------------------------------------------------- the commands


CONFIG = """
model:
  class_path: CausalLM
  init_args:
    model_name_or_path: {base}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.1}}}}
data:
  class_path: tests.adapters.test_files.Tokens
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  limit_val_batches: 0
  {trainer}
  callbacks:
  - class_path: {adapter}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {{dirpath: {root}/ckpt, filename: last}}
"""


class Tokens(pl.LightningDataModule):
    """Batches as CausalLM takes them."""

    def train_dataloader(self) -> Any:
        rows = loader(MODEL).dataset
        return DataLoader([{"input_ids": rows[i][0], "labels": rows[i][0]} for i in range(8)], batch_size=2)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*has no tokenizer")
def test_the_commands_fit_from_a_folder_export_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = pretrained()
    base.save_pretrained(str(tmp_path / "base"))
    theirs = get_peft_model(pretrained(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / "saved"))
    config, start = tmp_path / "run.yaml", tmp_path / "saved"
    adapter = f"Adapter\n    init_args: {{method: {start}}}"
    config.write_text(CONFIG.format(base=tmp_path / "base", root=tmp_path, adapter=adapter, trainer=""))
    assert main(["fit", "--config", str(config)]) == 0, capsys.readouterr().err
    common = ["--config", str(config), "--ckpt_path", str(tmp_path / "ckpt" / "last.ckpt"), "--output"]
    assert main(["export", *common, str(tmp_path / "exported")]) == 0, capsys.readouterr().err
    trained = logits(PeftModel.from_pretrained(pretrained(), str(tmp_path / "exported")))
    assert (trained - logits(theirs)).abs().max() > 0
    capsys.readouterr()
    assert main(["merge", *common, str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    assert "note: no tokenizer is written" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    for args, message in (
        ([*common, str(tmp_path / "merged")], "exists already"),
        ([*common[:3], str(tmp_path / "ckpt" / "lst.ckpt"), "--output", str(tmp_path / "new")], "Did you mean"),
        ([*common[:4]], "--output is missing"),
    ):
        assert main(["merge", *args]) == 1
        assert message in capsys.readouterr().err
    assert main(["merge"]) == 2
    assert "AutoModel reads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "trainer",
    ["precision: bf16-true", "plugins: [{class_path: QuantizedPrecision, init_args: {mode: int8}}]"],
    ids=["bf16-true", "int8"],
)
def test_the_merge_command_knows_the_precision_of_the_run(
    trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained().save_pretrained(str(tmp_path / "base"))
    config = tmp_path / "run.yaml"
    adapter = "LoRA\n    init_args: {rank: 2}"
    config.write_text(CONFIG.format(base=tmp_path / "base", root=tmp_path, adapter=adapter, trainer=trainer))
    assert main(["fit", "--config", str(config)]) == 0, capsys.readouterr().err
    args = ["merge", "--config", str(config), "--ckpt_path", str(tmp_path / "ckpt" / "last.ckpt"), "--output"]
    capsys.readouterr()
    if "int8" in trainer:
        assert main([*args, str(tmp_path / "refused")]) == 1
        assert "dequantize" in capsys.readouterr().err
        args = [args[0], "--dequantize", "true", *args[1:]]
    assert main([*args, str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    assert main(["export", "--config", str(config), *args[-3:-1], "--output", str(tmp_path / "adapter")]) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        lora_A, lora_B = (tensors[f"base_model.model.{layer}.lora_{each}.weight"] for each in "AB")
        delta = 2 * lora_B @ lora_A
        original = pretrained().get_submodule(layer).weight
        step = (original.abs().max() + delta.abs().max()) / (127 if "int8" in trainer else 128)  # of the rounding
        assert delta.abs().max() > 4 * step
        assert (merged.get_submodule(layer).weight.float() - original - delta).abs().max() < step
