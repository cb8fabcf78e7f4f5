from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft import VPT
from lightning_peft.adapters.native import VPTConfig
from lightning_peft.adapters.native.vpt import VPTLayer
from lightning_peft.errors import ConfigError, ScopeError
from tests.adapters.native.life import resume
from tests.adapters.native.models import batch, build, output
from tests.adapters.native.test_rank_growth import run

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
