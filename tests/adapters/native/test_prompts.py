from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft import VPT, NTKAttention, ResumableDataLoader
from lightning_peft.adapters.native import NTKAttentionConfig, VPTConfig
from lightning_peft.adapters.native.ntk_attention import NTKAttentionLayer
from lightning_peft.adapters.native.vpt import VPTLayer
from lightning_peft.errors import ConfigError, ScopeError
from tests.adapters.native.life import resume
from tests.adapters.native.models import batch, build, loss, output
from tests.adapters.native.test_in_training import Module
from tests.adapters.native.test_rank_growth import run
from tests.precision.tiny import VOCAB

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def tiny_vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 5
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ViTForImageClassification(config).eval()


def blocks_of(model: Any) -> list[nn.Module]:
    found = [m for m in model.modules() if type(m).__name__ in ("ViTLayer", "Block")]
    assert len(found) in (2, 3)
    return found


def prompts(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, VPTLayer)]
    return [m.tensor("prompts", "default") for m in layers if "default" in m.vpt_prompts]  # type: ignore[operator]


def by_formula(model: Any, pixels: Tensor, P: list[Tensor], deep: bool) -> Tensor:
    """Equations 4 to 8 on the base model's own pieces, with a class token before the prompts."""
    tokens = model.vit.embeddings(pixels)
    if isinstance(tokens, tuple):
        tokens = tokens[0]
    cls, E, Z = tokens[:, :1], tokens[:, 1:], P[0]
    for i, block in enumerate(blocks_of(model)):
        if deep or i == 0:
            Z = P[i].expand(len(pixels), -1, -1)
        out = block(torch.cat([cls, Z, E], dim=1))
        out = out[0] if isinstance(out, tuple) else out
        n = P[0].shape[0]
        cls, Z, E = out[:, :1], out[:, 1 : 1 + n], out[:, 1 + n :]
    return model.classifier(model.vit.layernorm(cls)[:, 0])


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_vpt_is_the_papers_equations(depth: Any, tmp_path: Path) -> None:
    base, pixels = tiny_vit(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks = r".*\.layers?\.\d+"
    config = VPTConfig(num_prompts=4, depth=depth, patch_values=48, target_modules=blocks)
    handle: Any = get_peft_model(copy.deepcopy(base), config)
    P = prompts(handle)
    assert [tuple(p.shape) for p in P] == [(4, 16)] * (3 if depth == "deep" else 1)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == 4 * 16 * len(P)
    limit = math.sqrt(6 / (48 + 16))
    values = torch.cat([p.detach().flatten() for p in P])
    assert 0.9 * limit < values.abs().max() <= limit
    if depth == "deep":
        assert not torch.equal(P[0], P[1])

    ours = handle(pixels).logits
    copies = [p.detach().clone().requires_grad_() for p in P]
    expected = by_formula(base, pixels, copies, depth == "deep")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, base(pixels).logits, atol=1e-4)
    C = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    (ours * C).sum().backward()
    (expected * C).sum().backward()
    for mine, theirs in zip(P, copies, strict=True):
        assert theirs.grad is not None
        assert theirs.grad.abs().max() > 1e-5
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)

    with handle.disable_adapter():
        assert torch.equal(handle(pixels).logits, base(pixels).logits)
    with pytest.raises(ConfigError, match="cannot be merged"):
        handle.merge_adapter()
    trained = handle(pixels).logits
    handle.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()  # type: ignore[arg-type]
        assert torch.equal(loaded(pixels).logits, trained)
    lengths: list[int] = []
    for layer in (m for m in handle.modules() if isinstance(m, VPTLayer)):
        layer.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    handle(pixels)
    assert lengths == ([5, 5, 5] if depth == "deep" else [9, 9, 5])


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_vpt_in_training_resumes(depth: Any, tmp_path: Path) -> None:
    module, trainer = resume(lambda: [VPT(num_prompts=3, depth=depth, position=0)], tmp_path)
    callback: Any = trainer.callbacks[0]
    assert sum(p.numel() for n, p in module.named_parameters() if n in callback.trainable_names) == 3 * 16 * (
        2 if depth == "deep" else 1
    )


def test_vpt_with_its_head_and_two_sets_of_prompts(tmp_path: Path) -> None:
    callback = VPT(num_prompts=3, position=0, always=["model.head"])
    run([callback], tmp_path, 2)
    assert {n for n in callback.trainable_names if "vpt_" not in n} == {"model.head.weight", "model.head.bias"}
    base, x = build("vit"), batch("vit")
    handle: Any = get_peft_model(
        copy.deepcopy(base), VPTConfig(num_prompts=2, position=0, target_modules=r"blocks\.\d")
    )
    one = output(handle, x)
    handle.add_adapter(
        "other", VPTConfig(num_prompts=1, position=0, depth="shallow", target_modules=r"blocks\.\d", seed=3)
    )
    handle.set_adapter("other")
    two = output(handle, x)
    assert not torch.allclose(one, two, atol=1e-4)
    handle.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(output(handle, x), two, atol=1e-4)
    handle.set_adapter("default")
    assert torch.equal(output(handle, x), one)


def test_vpt_mistakes(tmp_path: Path) -> None:
    for options, text in (
        ({"num_prompts": 0}, "num_prompts=0"),
        ({"depth": "deap"}, "'deep'"),
        ({"position": -1}, "position=-1"),
        ({"num_prompt": 3}, "'num_prompts'"),
    ):
        with pytest.raises(ConfigError, match=text):
            VPTConfig(**options)  # type: ignore[arg-type]
    llama: Any = get_peft_model(build("llama"), VPTConfig(target_modules=r".*\.layers\.\d+"))
    with pytest.raises(ConfigError, match="mask or positions"):
        llama(batch("llama"), attention_mask=torch.ones(3, 6, dtype=torch.int64))
    picture: Any = get_peft_model(
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), VPTConfig(target_modules="0")
    )
    with pytest.raises(ConfigError, match="need tokens"):
        picture(torch.randn(2, 3, 4, 4))
    with pytest.raises(ConfigError, match="give width"):
        get_peft_model(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1))), VPTConfig(target_modules="0"))
    with pytest.raises(ScopeError, match="blocs"):
        run([VPT(layers="blocs")], tmp_path, 1)


# ---------------------------------------------------------------- NTK-Attention

ATTENTION = {"llama": r".*self_attn", "gpt2": r".*\.attn", "vit": r".*\.attention"}


def transformer(name: str, implementation: str) -> Any:
    model = tiny_vit() if name == "vit" else build(name).eval()
    model.set_attn_implementation(implementation)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    padded = torch.ones(3, 6, dtype=torch.int64)
    padded[0, :2] = 0
    return {"input_ids": batch(name), "attention_mask": padded}


def ntk_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, NTKAttentionLayer)]


def shake_ntk(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in ntk_layers(model):
            for role, std in (("Z", 0.5), ("k", 0.5)):
                p = layer.tensor(role, "default")
                p.copy_(torch.randn(p.shape, generator=generator) * std)


def plain_attention(parameters: dict[Any, tuple[Tensor, Tensor]]) -> Any:
    """The paper's formula in float64, one query after the other, in the place of transformers' eager attention."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        Z, k = parameters[module.layer_idx]
        rows, heads, length, d = query.shape
        out = torch.zeros(rows, length, heads, d, dtype=torch.float64)
        for row in range(rows):
            for head in range(heads):
                source = head // (heads // key.shape[1])
                for t in range(length):
                    q = query[row, head, t].double()
                    scores = key[row, source].double() @ q * scaling
                    seen = torch.ones(len(scores), dtype=torch.bool)
                    if attention_mask is not None:
                        seen = attention_mask[row, 0, t, : len(scores)] > -1
                    if not seen.any():
                        out[row, t, head] = value[row, source].double().mean(0)
                        continue
                    e = scores[seen].exp()
                    x = q / d**0.25
                    phi = torch.where(x > 0, x, x.exp() - 1) + 1
                    above = e @ value[row, source][seen].double() + phi @ Z[head].double()
                    out[row, t, head] = above / (e.sum() + phi @ k[head].double().abs())
        return out.to(query.dtype), None

    return attend


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ntk_attention_is_the_formula(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt2 import modeling_gpt2
    from transformers.models.llama import modeling_llama

    base = transformer(name, implementation)
    x = inputs(name)
    handle: Any = get_peft_model(copy.deepcopy(base), NTKAttentionConfig(target_modules=ATTENTION[name]))
    found = ntk_layers(handle)
    heads, size = base.config.num_attention_heads, base.config.hidden_size // base.config.num_attention_heads
    assert len(found) == 2
    trained = sum(p.numel() for p in handle.parameters() if p.requires_grad)
    assert trained == 2 * heads * (size**2 + size)
    seen = x["attention_mask"].bool()
    torch.testing.assert_close(handle(**x).logits[seen], base(**x).logits[seen], rtol=1e-2, atol=1e-2)
    for layer in found:
        for role in ("Z", "k"):
            with torch.no_grad():
                layer.tensor(role, "default").zero_()
    torch.testing.assert_close(handle(**x).logits[seen], base(**x).logits[seen], rtol=1e-5, atol=1e-5)

    shake_ntk(handle)
    ours = handle(**x).logits
    C = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)) * seen[..., None]
    (ours * C).sum().backward()
    copies = [[layer.tensor(r, "default").detach().clone().requires_grad_() for r in ("Z", "k")] for layer in found]
    base.set_attn_implementation("eager")
    module = {"llama": modeling_llama, "gpt2": modeling_gpt2}[name]
    monkeypatch.setattr(module, "eager_attention_forward", plain_attention({i: tuple(c) for i, c in enumerate(copies)}))
    expected = base(**x).logits
    torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-4, atol=1e-4)
    (expected * C).sum().backward()
    for layer, values in zip(found, copies, strict=True):
        for role, value in zip(("Z", "k"), values, strict=True):
            assert value.grad is not None
            assert value.grad.abs().max() > 1e-4
            torch.testing.assert_close(layer.tensor(role, "default").grad, value.grad, rtol=1e-3, atol=1e-4)


def test_ntk_attention_lives(tmp_path: Path) -> None:
    for name in ATTENTION:
        base, x = transformer(name, "sdpa"), inputs(name)
        handle: Any = get_peft_model(copy.deepcopy(base), NTKAttentionConfig(target_modules=ATTENTION[name]))
        start = {n: p.detach().clone() for n, p in handle.named_parameters()}
        optimizer = torch.optim.Adam([p for p in handle.parameters() if p.requires_grad], lr=1e-2)
        data = next(iter(x.values()))
        before = loss(handle, data)
        for _ in range(3):
            optimizer.zero_grad()
            loss(handle, data).backward()
            optimizer.step()
        assert loss(handle, data) < before
        assert all(torch.equal(p, start[n]) != p.requires_grad for n, p in handle.named_parameters())
        with handle.disable_adapter():
            assert torch.equal(handle(**x).logits, base(**x).logits)
        assert handle.config._attn_implementation == "sdpa"
        trained = handle(**x).logits
        handle.save_pretrained(tmp_path / name)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, **options).eval()  # type: ignore[arg-type]
            assert torch.equal(loaded(**x).logits, trained)
        with pytest.raises(ConfigError, match="cannot be merged"):
            handle.merge_adapter()
    shake_ntk(
        llama := get_peft_model(transformer("llama", "sdpa"), NTKAttentionConfig(target_modules=ATTENTION["llama"]))
    )
    ids = batch("llama")
    first = llama(ids[:, :4], use_cache=True)
    after = llama(ids[:, 4:5], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(after[:, 0], llama(ids[:, :5]).logits[:, 4], rtol=1e-4, atol=1e-4)


class Language(Module):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = build("llama")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value = self.model(batch, labels=batch).loss
        self.losses.append(float(value.detach()))
        return value


def test_ntk_attention_in_training_resumes(tmp_path: Path) -> None:
    ids = torch.randint(0, VOCAB, (24, 6), generator=torch.Generator().manual_seed(0))

    def make(steps: int, ckpt: Path | None = None) -> tuple[Any, Any, Any]:
        callback, module = NTKAttention(), Language()
        data: Any = ResumableDataLoader(list(ids), batch_size=4)  # type: ignore[arg-type]
        _, trainer = run([callback], tmp_path, steps, ckpt, module, data)
        return callback, module, trainer

    callback, whole, _ = make(6)
    _, _, half = make(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = make(6, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[3:]
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert len(saved) == 4
    assert all(".ntk_attention_" in name for name in saved)
    callback.export(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "peft").eval()
    assert torch.equal(output(loaded, ids), output(whole.model.eval(), ids))


def test_ntk_attention_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_std"):
        NTKAttentionConfig(init_std=0.0)
    with pytest.raises(ConfigError, match="dropout"):
        NTKAttentionConfig(dropout=0.1)
    with pytest.raises(ConfigError, match="attention module of transformers"):
        get_peft_model(build("vit"), NTKAttentionConfig(target_modules=["qkv"]))
    model: Any = get_peft_model(build("llama"), NTKAttentionConfig(target_modules=ATTENTION["llama"]))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match="'sdpa' and 'eager'"):
        model(batch("llama"))
    with pytest.raises(ScopeError, match="'attention'"):
        run([NTKAttention(layers="atention")], tmp_path, 1, module=Language())
