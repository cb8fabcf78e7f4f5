from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from lightning_peft.adapters.native import IntTuneConfig, LoLDUConfig, LoRAXSConfig, NLoRAConfig, SLoRAConfig
from lightning_peft.errors import ConfigError
from tests.adapters.native.models import TARGETS, batch, build, loss, matrix_shape, output
from tests.oracles import three_factor as oracle

# peft asks transformers 5.23 for this by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANK = 3
# config class -> options, and the paper's number of trained values for a layer (out, in) at rank r
METHODS: dict[str, tuple[type, dict[str, Any], Any]] = {
    "lora_xs": (LoRAXSConfig, {"init_std": 0.0}, lambda o, i, r: r * r),
    "slora": (SLoRAConfig, {"alpha": 6.0}, lambda o, i, r: r * (o + i) + r * r),
    "nlora": (NLoRAConfig, {"alpha": 6.0}, lambda o, i, r: r * (o + i) + r * r),
    "inttune": (IntTuneConfig, {}, lambda o, i, r: r * r),
    "loldu": (LoLDUConfig, {"alpha": 6.0}, lambda o, i, r: r + 1),
}
ALL = pytest.mark.parametrize("method", METHODS)


def make(method: str, targets: Any, **options: Any) -> Any:
    kind, defaults, _ = METHODS[method]
    return kind(r=RANK, target_modules=targets, **{**defaults, **options})


def shake(model: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@ALL
@pytest.mark.parametrize("name", TARGETS)
def test_life(method: str, name: str, tmp_path: Path) -> None:
    base = build(name).train()
    x, before = batch(name), {k: v.clone() for k, v in base.state_dict().items()}
    expected = output(base, x)
    handle = get_peft_model(copy.deepcopy(base), make(method, TARGETS[name]))
    found = layers(handle)
    assert len(found) == {"llama": 4, "gpt2": 6, "vit": 5}[name]

    # identity, and the paper's number of parameters
    assert torch.equal(output(handle, x), expected)
    count = sum(METHODS[method][2](*matrix_shape(layer.base_layer), RANK) for layer in found.values())
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == count > 0

    # only what the method trains moves, and the base never does
    start = {n: p.detach().clone() for n, p in handle.named_parameters()}
    frozen = {n: b.clone() for n, b in handle.named_buffers()}
    optimizer = torch.optim.Adam([p for p in handle.parameters() if p.requires_grad], lr=1e-2)
    first = loss(handle, x)
    for _ in range(3):
        optimizer.zero_grad()
        loss(handle, x).backward()
        optimizer.step()
    assert loss(handle, x) < first
    for n, p in handle.named_parameters():
        assert torch.equal(p, start[n]) != p.requires_grad, n
    assert all(torch.equal(b, frozen[n]) for n, b in handle.named_buffers())
    for k, v in handle.get_base_model().state_dict().items():
        if k.replace(".base_layer", "") in before:
            assert torch.equal(v, before[k.replace(".base_layer", "")])
    trained = output(handle, x)
    assert not torch.allclose(trained, expected)
    with handle.disable_adapter():
        assert torch.equal(output(handle, x), expected)
    assert torch.equal(output(handle, x), trained)

    # saved, loaded with zero difference, merged
    handle.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is METHODS[method][0]
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True, "adapter_name": "again"}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).train()  # type: ignore[arg-type]
        assert torch.equal(output(loaded, x), trained)
        trains = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
        assert trains == (count if "is_trainable" in options else 0)
    handle.merge_adapter()
    torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-4)
    handle.unmerge_adapter()
    torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-4)
    merged: Any = handle.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(before)
    assert type(merged) is type(base)


def small(method: str, bias: bool = False, **options: Any) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(7, 5, bias=bias)).double()
    handle = get_peft_model(model, make(method, ["0"], **options))
    return handle, layers(handle)["base_model.model.0"]


def weight_by_formula(method: str, layer: Any, start: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> np.ndarray:
    weight, scaling = layer.base_layer.weight.detach().numpy(), 2.0  # alpha / r
    if method == "lora_xs":
        return oracle.lora_xs_weight(weight, RANK, now["R"], scaling)
    if method == "slora":
        return weight + scaling * now["B"] @ now["R"] @ now["A"]
    if method == "nlora":
        return oracle.nlora_weight(weight, RANK, now["A"], now["R"], now["B"], scaling, pinv=True)
    if method == "inttune":
        A, B = weight[:RANK], weight[:, :RANK]
        return oracle.nlora_weight(weight, RANK, A, now["R"], B, scaling, pinv=True)
    return oracle.loldu_weight(weight, RANK, now["R"], now["scale"][0], start["R"], start["scale"][0])


@ALL
def test_values_and_gradients_are_those_of_the_formula(method: str) -> None:
    handle, layer = small(method, alpha=6.0, **({"core": "pinv"} if method in ("nlora", "inttune") else {}))
    read = lambda: {role: layer.tensor(role, "default").detach().numpy().copy() for role in layer.trained}  # noqa: E731
    start = read()
    shake(handle)
    now = read()
    generator = torch.Generator().manual_seed(2)
    x, C = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 7), (4, 5)))
    y = handle(x)
    expected = weight_by_formula(method, layer, start, now)
    np.testing.assert_allclose(y.detach().numpy(), x.numpy() @ expected.T, rtol=1e-9, atol=1e-11)
    weight = layer.base_layer.weight.detach().numpy()
    np.testing.assert_allclose(layer.get_delta_weight("default").numpy(), expected - weight, rtol=1e-8, atol=1e-11)

    (y * C).sum().backward()
    weight_gradient = C.numpy().T @ x.numpy()
    step = 1e-6
    for role, values in now.items():
        gradient = layer.tensor(role, "default").grad.numpy()
        assert np.abs(gradient).max() > 1e-3
        for index in np.ndindex(values.shape):
            ends = []
            for sign in (step, -step):
                moved = {r: v.copy() for r, v in now.items()}
                moved[role][index] += sign
                ends.append(np.sum(weight_gradient * weight_by_formula(method, layer, start, moved)))
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7)
    if layer.trained == ("R",):
        A, B = (layer.tensor(role, "default").detach().numpy() for role in "AB")
        by_entry = oracle.core_gradient(weight_gradient, A, B, 2.0)
        np.testing.assert_allclose(layer.tensor("R", "default").grad.numpy(), by_entry, rtol=1e-9)


def test_starts_are_the_papers() -> None:
    # LoRA-XS: R is normal with the paper's standard deviation, the model next to its base
    model = build("llama")
    handle = get_peft_model(copy.deepcopy(model), LoRAXSConfig(r=16, target_modules="all-linear"))
    R = torch.cat([layer.tensor("R", "default").flatten() for layer in layers(handle).values()])
    assert R.numel() == 14 * 256
    assert R.std().item() == pytest.approx(1e-5, rel=0.05)
    assert R.mean().abs().item() < 5e-7
    A = layers(handle)["base_model.model.model.layers.0.mlp.up_proj"].tensor("A", "default")
    spectrum = torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight)[:16]
    torch.testing.assert_close(A.norm(dim=1), spectrum)
    x = batch("llama")
    torch.testing.assert_close(output(handle, x), output(model, x), rtol=0, atol=2e-3)
    # NLoRA: with the pseudo-inverse the start is the Nystroem approximation, exact for a weight of rank r
    low = nn.Sequential(nn.Linear(7, 5, bias=False)).double()
    with torch.no_grad():
        low[0].weight.copy_(
            torch.arange(15.0).double().reshape(5, 3).sin() @ torch.arange(21.0).double().reshape(3, 7).cos()
        )
    layer = layers(get_peft_model(low, make("nlora", ["0"], core="pinv")))["base_model.model.0"]
    B, N, A = (layer.tensor(role, "default") for role in "BRA")
    torch.testing.assert_close(B @ N @ A, low[0].base_layer.weight, rtol=1e-8, atol=1e-10)
    # LoLDU at full rank is the whole weight; a pivot of zero does no harm
    full = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        full[0].weight[3] = full[0].weight[2]
    layer = layers(get_peft_model(full, LoLDUConfig(r=4, target_modules=["0"])))["base_model.model.0"]
    B, z, A = (layer.tensor(role, "default") for role in "BRA")
    torch.testing.assert_close(B @ torch.diag(z) @ A, full[0].base_layer.weight, rtol=1e-9, atol=1e-12)
    # SLoRA: uniform within one over the square root of the columns
    layer = layers(get_peft_model(build("vit"), SLoRAConfig(r=8, target_modules=["fc2"])))
    for module in layer.values():
        A, R = module.tensor("A", "default"), module.tensor("R", "default")
        assert 0.9 / math.sqrt(32) < A.abs().max() <= 1 / math.sqrt(32)
        assert 0.8 / math.sqrt(8) < R.abs().max() <= 1 / math.sqrt(8)


@pytest.mark.parametrize("init", ["uniform", "normal", "constant", "zeros"])
def test_loldu_starts_of_z_keep_the_identity(init: Any) -> None:
    handle, layer = small("loldu", init=init)
    diagonal = oracle.pldu(layer.base_layer.weight.detach().numpy())[2][:RANK]
    z = layer.tensor("R", "default").detach().numpy()
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(handle(x), layer.base_layer(x))
    if init == "uniform":
        assert 0 < np.abs(z).max() <= abs(diagonal.mean()) / 2
    elif init == "normal":
        assert len(set(z)) == RANK
    else:
        np.testing.assert_allclose(z, diagonal.mean() if init == "constant" else 0.0, rtol=1e-9)


@pytest.mark.parametrize("method", ["lora_xs", "slora", "loldu"])
def test_same_seed_same_start_and_no_global_randomness(method: str) -> None:
    options = {"lora_xs": {"init_std": 1.0, "svd": "randomized"}, "loldu": {"init": "normal"}}.get(method, {})
    states = []
    for global_seed, seed in ((0, 7), (1, 7), (0, 8)):
        torch.manual_seed(global_seed)
        rng = torch.get_rng_state()
        handle = get_peft_model(build("vit"), make(method, TARGETS["vit"], seed=seed, **options))
        assert torch.equal(torch.get_rng_state(), rng)
        states.append({n: p.detach() for n, p in handle.named_parameters() if p.requires_grad})
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    pair = [states[0][n] for n in states[0] if "qkv" in n and n.endswith(f"{method}_R.default")]
    assert len(pair) == 2
    assert not torch.equal(*pair), "layers of one shape must not start alike"


def test_randomized_svd_finds_the_exact_one() -> None:
    from lightning_peft.adapters.native.three_factor import top_singular

    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.8 ** torch.arange(60.0))
    exact = top_singular(matrix, 5)
    fast = top_singular(matrix, 5, generator=torch.Generator().manual_seed(1))
    for a, b in zip(exact, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@ALL
def test_a_bfloat16_base_keeps_float32_adapters_and_no_float32_activations(method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 8)).bfloat16()
    handle = get_peft_model(model, make(method, ["0", "2"]))
    assert {t.dtype for n, t in handle.state_dict().items() if f"{method}_" in n} == {torch.float32}
    shake(handle)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(5, 11, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = handle(x)
    assert out.dtype == torch.bfloat16
    activations = [t for t in saved if t.numel() >= 55 and (t.shape[0] == 5 or t.shape[0] == 55)]
    assert len(activations) >= 4
    assert {t.dtype for t in activations} == {torch.bfloat16}
    out.float().square().mean().backward()
    grads = [p.grad for p in handle.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    merged: Any = copy.deepcopy(handle).merge_and_unload()
    layer = layers(handle)["base_model.model.0"]
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    assert torch.equal(merged[0].weight, exact.bfloat16()), "summed in float32, rounded once"


@ALL
def test_several_adapters(method: str) -> None:
    base = build("vit")
    x = batch("vit")
    handle: Any = get_peft_model(copy.deepcopy(base), make(method, ["qkv"]))
    shake(handle)
    first = output(handle, x)
    handle.add_adapter("other", make(method, ["qkv", "fc2"]))
    handle.set_adapter("other")
    assert torch.equal(output(handle, x), output(base, x))
    names = [n for n, p in handle.named_parameters() if p.requires_grad]
    assert names
    assert all(n.endswith(".other") for n in names)
    shake(handle, seed=4)
    second = output(handle, x)
    handle.base_model.set_adapter(["default", "other"])
    both = output(handle, x)
    assert not torch.allclose(both, first)
    merged = copy.deepcopy(handle).merge_and_unload()
    torch.testing.assert_close(output(merged, x), both, rtol=1e-4, atol=1e-4)
    handle.set_adapter("default")
    assert torch.equal(output(handle, x), first)
    handle.set_adapter("other")
    assert torch.equal(output(handle, x), second)
    handle.delete_adapter("default")
    assert not [n for n, _ in handle.named_parameters() if n.endswith(".default")]
    assert torch.equal(output(handle, x), second)


@ALL
def test_a_quantised_base_stays_quantised(method: str) -> None:
    from lightning_peft.precision import merge_adapter, quantize

    model = build("llama")
    quantize(model, "nf4")
    x = batch("llama")
    expected = output(model, x)
    handle = get_peft_model(model, make(method, ["q_proj", "down_proj"]))
    assert torch.equal(output(handle, x), expected)
    codes = {n: p.clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    assert len(codes) == 4
    shake(handle)
    loss(handle, x).backward()
    assert all(p.grad is not None for p in handle.parameters() if p.requires_grad)
    trained = output(handle, x)
    with pytest.raises(ConfigError, match="dequantize=True"):
        handle.merge_adapter()
    for n, p in model.named_parameters():
        if n in codes:
            assert torch.equal(p, codes[n])
    merge_adapter(model, dequantize=True)
    assert not layers(model)
    torch.testing.assert_close(output(model, x), trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lora_xs", "nlora", "inttune", "loldu"])
def test_files_of_trained_values_only(method: str, tmp_path: Path) -> None:
    base = build("llama")
    x = batch("llama")
    handle = get_peft_model(copy.deepcopy(base), make(method, ["q_proj"], save_frozen=False))
    shake(handle)
    expected = output(handle, x)
    handle.save_pretrained(tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(v.numel() for v in values.values()) == 2 * METHODS[method][2](32, 32, RANK)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, x), expected)
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)


@ALL
def test_convolutions(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", dilation=2), nn.Conv2d(6, 5, 1))
    x = torch.randn(2, 4, 9, 9)
    expected = model(x)
    handle = get_peft_model(copy.deepcopy(model), make(method, ["0", "1"]))
    assert torch.equal(handle(x), expected)
    shake(handle)
    trained = handle(x)
    assert not torch.allclose(trained, expected, atol=1e-2)
    merged: Any = handle.merge_and_unload()
    torch.testing.assert_close(merged(x), trained, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    base = build("vit")
    x = batch("vit")
    handle = get_peft_model(copy.deepcopy(base), make("slora", ["fc2"], dropout=0.5))
    handle.train()
    assert torch.equal(output(handle, x), output(base, x))
    shake(handle)
    assert not torch.equal(output(handle, x), output(handle, x))
    handle.eval()
    assert torch.equal(output(handle, x), output(handle, x))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'inti_std'.*'init_std'"):
        LoRAXSConfig(inti_std=1e-5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"svd='exat'.*'exact'"):
        LoRAXSConfig(svd="exat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"init='unifrom'.*'uniform'"):
        LoLDUConfig(init="unifrom")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="core='inverse'"):
        NLoRAConfig(core="inverse")  # type: ignore[arg-type]
    for options in ({"r": 0}, {"r": 2.0}, {"dropout": 1.0}, {"alpha": 0.0}, {"seed": 1.5}, {"alpha": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            SLoRAConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"r=40 is more than blocks\.0\.qkv"):
        get_peft_model(build("vit"), LoRAXSConfig(r=40, target_modules=["qkv"]))
    with pytest.raises(ConfigError, match="MultiheadAttention"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoRAXSConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ConfigError, match="Embedding"):
        get_peft_model(build("llama"), LoRAXSConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="meta device"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, device="meta")), LoRAXSConfig(r=2, target_modules=["0"]))
    with pytest.raises(ConfigError, match="groups"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), LoRAXSConfig(r=2, target_modules=["0"]))


def test_registration_is_idempotent_and_adds_to_peft() -> None:
    from peft.utils import PeftType

    from lightning_peft.adapters.native.lora_xs import LoRAXSTuner
    from lightning_peft.adapters.native.tuner import register

    register("lora_xs", LoRAXSConfig, LoRAXSTuner)
    assert PeftType("LORA_XS") is PeftType.LORA_XS  # type: ignore[attr-defined]
    assert list(PeftType).count(PeftType.LORA_XS) == 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="of its own"):
        register("lora", LoRAXSConfig, LoRAXSTuner)
