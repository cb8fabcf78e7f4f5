from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from lightning_peft import DePT, ResumableDataLoader
from lightning_peft.adapters.native import DePTConfig
from lightning_peft.adapters.native.dept import DePTLayer
from lightning_peft.errors import ConfigError, ScopeError
from tests.adapters.native.models import batch, build, output
from tests.adapters.native.test_prompts import Language
from tests.adapters.native.test_rank_growth import run
from tests.precision.tiny import VOCAB

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
NAMES = {"llama": "model", "gpt2": "transformer"}


def config(name: str, **options: Any) -> DePTConfig:
    return DePTConfig(**{"num_prompts": 3, "r": 2, "max_length": 5, "alpha": 4.0, "init_std": 0.3, **options,
                         "target_modules": NAMES[name]})  # fmt: skip


def layer_of(model: Any) -> Any:
    (layer,) = (m for m in model.modules() if isinstance(m, DePTLayer))
    return layer


def values(layer: Any) -> list[Tensor]:
    return [layer.tensor(role, "default") for role in ("prompts", "A", "B")]


def shake(layer: Any) -> None:
    with torch.no_grad():
        B = layer.tensor("B", "default")
        B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(1)) * 0.3)


def masked() -> Tensor:
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_dept_is_the_formula(name: str, tmp_path: Path) -> None:
    base, ids, mask = build(name).eval(), batch(name), masked()
    handle: Any = get_peft_model(copy.deepcopy(base), config(name)).eval()
    layer = layer_of(handle)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == 3 * 32 + 2 * (5 + 32)

    # without the low-rank part: what peft calls prompt tuning
    prompt: Any = get_peft_model(copy.deepcopy(base), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with torch.no_grad():
        prompt.prompt_encoder["default"].embedding.weight.copy_(values(layer)[0])
    expected = prompt.eval()(input_ids=ids, attention_mask=mask, labels=ids)
    ours = handle(input_ids=ids, attention_mask=mask, labels=ids)
    seen = mask.bool()
    torch.testing.assert_close(ours.logits[seen], expected.logits[:, 3:][seen], rtol=1e-4, atol=1e-4)

    # with it: the base model on embeddings put together by hand
    shake(layer)
    ours = handle(input_ids=ids, attention_mask=mask).logits
    P, A, B = (v.detach().clone().requires_grad_() for v in values(layer))
    E = base.get_input_embeddings()(ids)
    rows = [
        torch.stack([E[i, t] + (A[t] @ B * 4.0 / math.sqrt(2) if t < 5 else 0.0) for t in range(6)]) for i in range(3)
    ]
    x = torch.cat([P.expand(3, -1, -1), torch.stack(rows)], dim=1)
    expected = base(inputs_embeds=x, attention_mask=torch.cat([torch.ones(3, 3, dtype=torch.int64), mask], 1)).logits[
        :, 3:
    ]
    torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-4, atol=1e-4)
    C = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)) * seen[..., None]
    (ours * C).sum().backward()
    (expected * C).sum().backward()
    for mine, theirs in zip(values(layer), (P, A, B), strict=True):
        assert theirs.grad is not None
        assert theirs.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)

    with handle.disable_adapter():
        assert torch.equal(output(handle, ids), output(base, ids))
    with pytest.raises(ConfigError, match="cannot be merged"):
        handle.merge_adapter()
    trained = output(handle, ids)
    handle.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()  # type: ignore[arg-type]
        assert torch.equal(output(loaded, ids), trained)


@pytest.mark.parametrize("name", NAMES)
def test_dept_generates_with_a_cache(name: str) -> None:
    handle: Any = get_peft_model(build(name).eval(), config(name, max_length=8))
    shake(layer_of(handle))
    ids, mask = batch(name)[:, :4], torch.ones(3, 4, dtype=torch.int64)
    mask[0, 0] = 0
    fast, slow = (
        handle.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            use_cache=cache,
            pad_token_id=0,
            eos_token_id=None,
        )
        for cache in (True, False)
    )
    assert fast.shape == (3, 9)
    assert torch.equal(fast, slow)
    first = handle(ids, use_cache=True)
    after = handle(fast[:, 4:5], past_key_values=first.past_key_values, use_cache=True).logits
    whole = handle(fast[:, :5]).logits
    torch.testing.assert_close(after[:, 0], whole[:, 4], rtol=1e-4, atol=1e-4)


def test_dept_pools_over_the_inputs_first_token() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(1)
        base: Any = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
            )
        ).eval()
    handle: Any = get_peft_model(
        copy.deepcopy(base), DePTConfig(num_prompts=3, r=2, max_length=8, target_modules="bert")
    )
    layer = layer_of(handle)
    shake(layer)
    ids, types = batch("llama"), torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(3, -1)
    P, A, B = values(layer)
    x = torch.cat(
        [P.expand(3, -1, -1), base.bert.embeddings.word_embeddings(ids) + A[:6] @ B * 8 / math.sqrt(2)], dim=1
    )
    hidden = base.bert(inputs_embeds=x, token_type_ids=torch.cat([torch.zeros(3, 3, dtype=torch.int64), types], 1))
    expected = base.classifier(base.bert.pooler(hidden.last_hidden_state[:, 3:]))
    torch.testing.assert_close(handle(ids, token_type_ids=types).logits, expected, rtol=1e-4, atol=1e-4)
    assert handle(ids).logits.shape == (3, 2)


def test_dept_in_training(tmp_path: Path) -> None:
    ids = torch.randint(0, VOCAB, (24, 6), generator=torch.Generator().manual_seed(0))

    def make(steps: int, ckpt: Path | None = None) -> tuple[Any, Any, Any]:
        callback = DePT(num_prompts=3, rank=2, max_length=8, init_std=0.3, low_rank_lr_ratio=0.01)
        module = Language()
        data: Any = ResumableDataLoader(list(ids), batch_size=4)  # type: ignore[arg-type]
        _, trainer = run([callback], tmp_path, steps, ckpt, module, data)
        return callback, module, trainer

    callback, whole, trainer = make(6)
    rates = {p.shape: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert rates == {(3, 32): 1e-2, (8, 2): pytest.approx(1e-4), (2, 32): pytest.approx(1e-4)}
    _, _, half = make(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = make(6, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[3:]
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 3
    assert all(".dept_" in name for name in saved)
    callback.export(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "peft").eval()
    assert torch.equal(output(loaded, ids), output(whole.model.eval(), ids))


def test_dept_mistakes(tmp_path: Path) -> None:
    for options, text in (
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 0.1}, "dropout"),
        ({"low_rank_lr_ratio": 0.0}, "low_rank_lr_ratio"),
    ):
        with pytest.raises(ConfigError, match=text):
            DePTConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without head"):
        get_peft_model(build("vit"), DePTConfig(r=2, target_modules="blocks"))
    with pytest.raises(ConfigError, match="r=40 is more"):
        get_peft_model(build("llama"), config("llama", r=40))
    handle: Any = get_peft_model(build("llama"), config("llama"))
    with pytest.raises(ConfigError, match=r"\(rows, tokens\)"):
        handle(batch("llama"), attention_mask=torch.zeros(3, 1, 6, 6))
    handle.add_adapter("other", config("llama"))
    handle.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="choose one"):
        handle(batch("llama"))
    with pytest.raises(ScopeError, match="'transformer'"):
        run([DePT(layers="transformr")], tmp_path, 1, module=Language())
