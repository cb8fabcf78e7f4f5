from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lightning_peft import SSF
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.native import SSFConfig
from lightning_peft.adapters.native.ssf import norm_offset
from lightning_peft.errors import ConfigError, ScopeError
from tests.adapters.native.life import live, resume
from tests.adapters.native.models import batch, build, loss, output
from tests.adapters.native.test_three_factor import layers, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
]

NORM_FREE = {"gpt2": "c_attn|c_fc|ln_1", "vit": "patches|qkv|proj|fc1|fc2|norm1|norm2"}
FEATURES = {
    "llama": 2 * (32 + 16 + 48 + 48 + 32 + 32),  # q, k, up, gate and down, one RMS norm; per block
    "gpt2": 2 * (96 + 128 + 32),
    "vit": 16 + 2 * (48 + 16 + 32 + 16 + 16 + 16),
}


def regex(names: str) -> str:
    return rf"(.*\.)?({names})"


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_life(name: str, tmp_path: Path) -> None:
    config = SSFConfig(target_modules=regex(NORM_FREE[name]), init_std=0.0)
    handle = live(build(name), batch(name), config, 2 * FEATURES[name], tmp_path)
    merged = merge_adapters(handle)
    assert set(merged.state_dict()) == set(build(name).state_dict()), "every layer had a bias"


@pytest.mark.parametrize(
    ("shift", "shifts"), [("existing", 0), ("mergeable", FEATURES["llama"] - 64), ("all", FEATURES["llama"])]
)
def test_where_a_llama_without_biases_is_shifted(shift: Any, shifts: int, tmp_path: Path) -> None:
    targets = regex("q_proj|k_proj|up_proj|gate_proj|down_proj|input_layernorm")
    config = SSFConfig(target_modules=targets, init_std=0.0, shift=shift)
    base, x = build("llama"), batch("llama")
    handle = live(base, x, config, FEATURES["llama"] + shifts, tmp_path, merges=shift == "existing")
    trained = output(handle, x)
    if shift == "existing":
        merged = merge_adapters(handle)
        assert list(merged.state_dict()) == list(base.state_dict()), "from_pretrained finds all of it"
        return
    if shift == "all":
        weights = {name: value.clone() for name, value in handle.state_dict().items()}
        with pytest.raises(ConfigError, match=r"LlamaRMSNorm has no bias.*shift='mergeable'"):
            handle.merge_adapter()
        now = handle.state_dict()
        assert all(torch.equal(now[name], weights[name]) for name in weights), "refused before anything is changed"
        return
    with pytest.warns(UserWarning, match="attention_bias"):
        handle.merge_adapter()
    torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-4)
    handle.unmerge_adapter()
    assert not [name for name in handle.state_dict() if name.endswith("base_layer.bias")], "added biases go again"
    with pytest.warns(UserWarning, match="attention_bias"):
        merged: Any = merge_adapters(handle)
    torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-4)
    assert merged.model.layers[0].self_attn.q_proj.bias is not None


class GemmaLike(nn.Module):
    """An RMS norm whose weight counts from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


GemmaLike.__name__ = "GemmaLikeRMSNorm"


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.exp()


Strange.__name__ = "StrangeNorm"

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", bias=False), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 1), (2, 2, 3, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 6)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 5, 5)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 6)),
    "gemma": (lambda: GemmaLike(6), (2, 6)),
}
SPATIAL = {"conv1d": 1, "conv2d": 2, "conv2d without bias": 2, "conv3d": 3, "group norm": 2, "batch norm": 2}


@pytest.mark.filterwarnings("ignore:SSF was merged into layers without a bias")
@pytest.mark.parametrize("kind", LAYERS)
def test_values_gradients_and_merging_are_those_of_the_formula(kind: str) -> None:
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        base = nn.Sequential(make()).double()
        if getattr(base[0], "bias", None) is not None:
            nn.init.normal_(base[0].bias)
        x = torch.randn(shape, dtype=torch.float64)
    handle: Any = get_peft_model(copy.deepcopy(base), SSFConfig(target_modules=["0"], init_std=0.3))
    handle.train()
    layer: Any = layers(handle)["base_model.model.0"]
    scale = layer.ssf_scale["default"]
    shift = layer.ssf_shift.get("default", None)
    assert (shift is None) == (kind in ("rms norm", "gemma"))
    along = (..., *(None,) * SPATIAL.get(kind, 0))
    frozen = base(x)
    expected = frozen * scale.detach()[along] + (0 if shift is None else shift.detach()[along])
    y = handle(x)
    torch.testing.assert_close(y, expected)

    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    features = tuple(scale.shape)
    axes = [axis for axis in range(y.ndim) if axis not in _feature_axes(y.ndim, len(features), SPATIAL.get(kind, 0))]
    torch.testing.assert_close(scale.grad, (weights * frozen).sum(axes))
    if shift is not None:
        torch.testing.assert_close(shift.grad, weights.sum(axes))

    handle.eval()
    trained = handle(x)
    handle.merge_adapter()
    torch.testing.assert_close(handle(x), trained, rtol=1e-10, atol=1e-10)
    handle.unmerge_adapter()
    torch.testing.assert_close(handle(x), trained, rtol=1e-10, atol=1e-10)
    merged: Any = handle.merge_and_unload()
    torch.testing.assert_close(merged(x), trained, rtol=1e-10, atol=1e-10)


def _feature_axes(ndim: int, features: int, spatial: int) -> list[int]:
    return list(range(ndim - spatial - features, ndim - spatial))


def test_initial_values_are_the_papers() -> None:
    handle = get_peft_model(build("vit"), SSFConfig(target_modules=regex("qkv|proj|fc1|fc2")))
    found = list(layers(handle).values())
    scales = torch.cat([layer.ssf_scale["default"] for layer in found])
    shifts = torch.cat([layer.ssf_shift["default"] for layer in found])
    assert scales.mean().item() == pytest.approx(1.0, abs=0.01)
    assert shifts.mean().item() == pytest.approx(0.0, abs=0.01)
    for values in (scales, shifts):
        assert values.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(scales - 1, shifts)


def test_several_adapters_merge_in_their_order() -> None:
    base, x = build("vit"), batch("vit")
    handle: Any = get_peft_model(copy.deepcopy(base), SSFConfig(target_modules=["qkv"], init_std=0.3))
    first = output(handle, x)
    handle.add_adapter("other", SSFConfig(target_modules=["qkv", "norm1"], init_std=0.3, seed=4))
    handle.base_model.set_adapter(["default", "other"])
    both = output(handle, x)
    layer: Any = layers(handle)["base_model.model.blocks.0.qkv"]
    z = torch.randn(3, 16)
    plain = layer.base_layer(z)
    for name in ("default", "other"):
        plain = plain * layer.ssf_scale[name] + layer.ssf_shift[name]
    torch.testing.assert_close(layer(z), plain)
    handle.merge_adapter()
    torch.testing.assert_close(output(handle, x), both, rtol=1e-4, atol=1e-5)
    handle.unmerge_adapter()
    handle.set_adapter("default")
    torch.testing.assert_close(output(handle, x), first, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_base() -> None:
    base, x = build("llama").bfloat16(), batch("llama")
    handle: Any = get_peft_model(copy.deepcopy(base), SSFConfig(target_modules=["down_proj"], init_std=0.1))
    assert {p.dtype for p in handle.parameters() if p.requires_grad} == {torch.float32}
    assert output(handle, x).dtype == torch.bfloat16
    loss(handle, x).backward()
    assert all(p.grad.dtype == torch.float32 for p in handle.parameters() if p.requires_grad)
    layer: Any = layers(handle)["base_model.model.model.layers.0.mlp.down_proj"]
    exact = layer.base_layer.weight.float() * layer.ssf_scale["default"][:, None]
    with pytest.warns(UserWarning, match="without a bias"):
        handle.merge_adapter()
    assert torch.equal(layer.base_layer.weight, exact.bfloat16()), "multiplied in float32, rounded once"


def test_a_quantised_base() -> None:
    from lightning_peft.precision import merge_adapter, quantize

    model, x = build("llama"), batch("llama")
    quantize(model, "nf4")
    expected = output(model, x)
    config = SSFConfig(target_modules=["q_proj", "down_proj"], init_std=0.0, shift="existing")
    handle: Any = get_peft_model(model, config)
    assert torch.equal(output(handle, x), expected)
    shake(handle)
    trained = output(handle, x)
    with pytest.raises(ConfigError, match="dequantize=True"):
        handle.merge_adapter()
    merge_adapter(model, dequantize=True)
    torch.testing.assert_close(output(model, x), trained, rtol=1e-3, atol=1e-3)


def test_fit_resume_and_scope(tmp_path: Path) -> None:
    def make() -> list[Any]:
        return [SSF(layers=["blocks", "embeddings"], seed=5)]

    module, trainer = resume(make, tmp_path)
    callback: Any = trainer.callbacks[0]
    sizes = {name: p.numel() for name, p in module.named_parameters() if ".ssf_" in name}
    assert sum(sizes.values()) == 2 * (16 + 2 * (48 + 16 + 32 + 16 + 16 + 16)), "layers and norms, and not the head"
    assert set(sizes) <= callback.trainable_names
    assert callback.handle.peft_config["default"].seed == 5


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shift='exisiting'.*'existing'"):
        SSF(shift="exisiting")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="init_std"):
        SSF(init_std=-1.0)
    with pytest.raises(ConfigError, match="dropout"):
        SSFConfig(dropout=0.1)
    with pytest.raises(ConfigError, match="SSF needs a linear layer"):
        get_peft_model(build("llama"), SSFConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="MultiheadAttention"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), SSFConfig(target_modules=["out_proj"]))
    with pytest.raises(ConfigError, match="StrangeNorm does not multiply"):
        norm_offset(Strange())
    with pytest.raises(ScopeError, match="no layer that the method takes"):
        fit_with(SSF(layers="*.heads"), tmp_path)
    handle: Any = get_peft_model(build("vit"), SSFConfig(target_modules=["qkv"]))
    with torch.no_grad():
        layers(handle)["base_model.model.blocks.0.qkv"].ssf_scale["default"][0] = 0.0
    handle.merge_adapter()
    with pytest.raises(ConfigError, match="cannot be restored"):
        handle.unmerge_adapter()


def fit_with(callback: Any, folder: Path) -> None:
    from tests.adapters.native.test_in_training import fit

    fit([callback], folder, 1)
