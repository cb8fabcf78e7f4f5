from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lightning_peft
from lightning_peft import Compacter, LowBitAdapters, SeriesAdapter
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.injection import inject
from lightning_peft.adapters.native import BottleneckConfig, CompacterConfig
from lightning_peft.adapters.native.features import input_of
from lightning_peft.adapters.places import module_paths
from lightning_peft.errors import ConfigError, ScopeError, UnsupportedStrategy
from lightning_peft.methods.quantized.low_bit_adapters import bake
from tests.adapters.native.life import live, resume
from tests.adapters.native.models import batch, build, loss, output
from tests.adapters.native.test_in_training import fit, loader
from tests.adapters.native.test_three_factor import layers, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
]

R = 8
SERIES = {  # the places after attention and feed-forward by their names in each model
    "llama": ["o_proj", "down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "bert": ["attention.output.dense", r"\d.output.dense"],
    "vit": ["blocks.0.proj", "blocks.1.proj", "blocks.0.fc2", "blocks.1.fc2"],
}
PARALLEL = {"llama": ["mlp"], "gpt2": ["mlp", "attn"], "bert": ["intermediate.dense"], "vit": ["blocks.0", "blocks.1"]}
WIDTH = {"llama": 32, "gpt2": 32, "bert": 32, "vit": 16}


class Root(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def regex(names: list[str]) -> str:
    return "|".join(rf"(.*\.)?{name}" for name in names)


@pytest.mark.parametrize("name", SERIES)
def test_series(name: str, tmp_path: Path) -> None:
    d = WIDTH[name]
    config = BottleneckConfig(r=R, target_modules=regex(SERIES[name]))
    handle = live(build(name), batch(name), config, 4 * (2 * d * R + R + d), tmp_path, merges=False)
    with pytest.raises(ConfigError, match=r"BOTTLENECK cannot be merged.*nonlinearity"):
        merge_adapters(handle)


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel(name: str, tmp_path: Path) -> None:
    d, out, count = WIDTH[name], {"bert": 48}.get(name, WIDTH[name]), {"gpt2": 4}.get(name, 2)
    config = BottleneckConfig(r=R, form="parallel", scaling=4.0, target_modules=regex(PARALLEL[name]))
    live(build(name), batch(name), config, count * (R * (d + out) + R + out), tmp_path, merges=False)


@pytest.mark.parametrize("name", SERIES)
def test_compacter(name: str, tmp_path: Path) -> None:
    d, k, n = WIDTH[name], 2, 4
    config = CompacterConfig(r=R, n=n, factor_rank=k, target_modules=regex(SERIES[name]), activation="relu")
    count = 4 * (k * (2 * d + 2 * R) + R + d) + n**3
    handle = live(build(name), batch(name), config, count, tmp_path, merges=False)
    found = list(layers(handle).values())
    assert [len(layer.compacter_rule) for layer in found] == [1, 0, 0, 0]
    loss(handle, batch(name)).backward()
    copied = copy.deepcopy(handle)
    shared = [layer.rule("default") for layer in layers(copied).values()]
    assert all(rule is shared[0] for rule in shared), "a copy shares its own"
    assert shared[0] is not found[0].rule("default")


def plain(config: Any, now: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The papers' formulas, one product at a time."""
    if isinstance(config, CompacterConfig):
        down, up = (
            sum(
                torch.kron(now["rule"][i], now[f"{part}_left"][i] @ now[f"{part}_right"][i])  # type: ignore[misc]
                for i in range(config.n)
            )
            for part in ("down", "up")
        )
    else:
        down, up = now["down"].T, now["up"].T
    h = (y if config.form == "series" else x) @ down
    h = h + now["down_bias"] if config.use_bias else h
    h = {"relu": lambda h: h.clamp(min=0), "gelu": lambda h: h * (1 + (h / 2**0.5).erf()) / 2, "none": lambda h: h}[
        config.activation
    ](h)
    h = h @ up
    h = h + now["up_bias"] if config.use_bias else h
    return y + config.scaling * h


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(r=3, target_modules="0"),
        BottleneckConfig(r=3, target_modules="0", use_bias=False, activation="gelu", scaling=0.5),
        BottleneckConfig(r=3, target_modules="0", form="parallel", scaling=4.0),
        BottleneckConfig(r=3, target_modules="0", form="parallel", activation="none", use_bias=False),
        CompacterConfig(r=4, n=2, target_modules="0"),
        CompacterConfig(r=4, n=2, factor_rank=2, target_modules="0", form="parallel", use_bias=False),
    ],
    ids=["series", "series_gelu", "parallel", "parallel_linear", "compacter", "compacter_parallel"],
)
def test_values_and_gradients_are_those_of_the_formula(config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6))).double()
        x, weights = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    handle = get_peft_model(model, copy.deepcopy(config))
    layer: Any = layers(handle)["base_model.model.0"]
    shake(handle, 0.5)
    held = {role: getattr(layer, layer.prefix + role) for role in layer.trained}
    names = {role: parameters["default"] for role, parameters in held.items() if len(parameters)}
    now = {role: p.detach().clone().requires_grad_() for role, p in names.items()}
    expected = plain(config, now, x, layer.base_layer(x))
    y = handle(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for role, parameter in names.items():
        assert now[role].grad.abs().max() > 1e-3, role  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, now[role].grad, rtol=1e-9, atol=1e-10, msg=role)


def test_a_dense_matrix_needs_no_kronecker() -> None:
    from lightning_peft.adapters.native.compacter import kronecker_sum

    one = torch.ones(1, 1, 1)
    left, right = torch.randn(1, 5, 2), torch.randn(1, 2, 3)
    torch.testing.assert_close(kronecker_sum(one, left, right), (left @ right)[0])


def test_initial_values() -> None:
    handle = get_peft_model(build("llama"), BottleneckConfig(r=16, target_modules=["down_proj"]))
    down = torch.cat([layer.bottleneck_down["default"] for layer in layers(handle).values()])
    assert 0.95 / 32**0.5 < down.abs().max() <= 1 / 32**0.5
    first, second = (layer.bottleneck_down["default"] for layer in layers(handle).values())
    assert not torch.equal(first, second)
    handle = get_peft_model(build("llama"), CompacterConfig(r=16, n=8, target_modules=["down_proj"]))
    layer: Any = next(iter(layers(handle).values()))
    assert layer.rule("default").std().item() == pytest.approx(0.01, rel=0.1)
    bound = 2**0.5 * (6 / (32 / 8 + 1)) ** 0.5
    assert 0.8 * bound < layer.compacter_down_left["default"].abs().max() <= bound


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def test_channels_of_pictures() -> None:
    model, x = Picture().eval(), torch.randn(2, 3, 8, 8)
    handle = get_peft_model(copy.deepcopy(model), BottleneckConfig(r=3, target_modules=["stem", "block"]))
    assert torch.equal(handle(x), model(x))
    shake(handle)
    stem, block = layers(handle).values()
    h = stem.base_layer(x)
    for layer, run in ((stem, None), (block, block.base_layer)):
        h = h if run is None else run(h)
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        z = torch.einsum("rc,bchw->brhw", down, h) + layer.bottleneck_down_bias["default"][:, None, None]
        h = h + torch.einsum("cr,brhw->bchw", up, z.relu()) + layer.bottleneck_up_bias["default"][:, None, None]
    torch.testing.assert_close(handle(x), h)
    with pytest.raises(ConfigError, match="form='series'"):
        get_peft_model(Picture(), BottleneckConfig(r=3, form="parallel", target_modules=["block"]))


class TwoOutputs(nn.Module):
    """Called by name, and returns a tuple, as attention does in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.seen = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(query=x, key=x, value=x)
        assert weights.shape == (2, 3, 3)
        return y


def test_a_whole_attention_returns_its_tuple() -> None:
    model, x = TwoOutputs(), torch.randn(2, 3, 8)
    handle = get_peft_model(copy.deepcopy(model), BottleneckConfig(r=3, form="parallel", target_modules=["attention"]))
    torch.testing.assert_close(handle(x), model(x))
    shake(handle)
    layer: Any = layers(handle)["base_model.model.attention"]
    now = {role: getattr(layer, f"bottleneck_{role}")["default"] for role in layer.trained}
    torch.testing.assert_close(handle(x), plain(layer.settings["default"], now, x, model(x)))


def test_which_input_a_parallel_adapter_gets() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert input_of((None, a), {"hidden_states": b}) is a
    assert input_of((), {"mask": a, "hidden_states": b}) is b
    assert input_of((), {"x": b, "mask": a}) is b
    with pytest.raises(ConfigError, match="without any tensor"):
        input_of((3,), {})


def test_several_adapters() -> None:
    base, x = build("vit"), batch("vit")
    for make in (BottleneckConfig, lambda **options: CompacterConfig(n=2, **options)):
        handle: Any = get_peft_model(copy.deepcopy(base), make(r=4, target_modules=["proj"]))
        shake(handle)
        first = output(handle, x)
        handle.add_adapter("other", make(r=2, target_modules=["fc2", "proj"]))
        handle.set_adapter("other")
        assert torch.equal(output(handle, x), output(base, x))
        shake(handle, seed=4)
        second = output(handle, x)
        handle.base_model.set_adapter(["default", "other"])
        assert not torch.allclose(output(handle, x), second)
        handle.delete_adapter("default")
        assert not [n for n, _ in handle.named_parameters() if n.endswith(".default")]
        assert torch.equal(output(handle, x), second)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("make", [BottleneckConfig, CompacterConfig])
def test_bfloat16_and_quantised_bases(make: Any) -> None:
    from lightning_peft.precision import quantize

    base, x = build("llama").bfloat16(), batch("llama")
    handle: Any = get_peft_model(base, make(r=4, target_modules=["o_proj", "down_proj"]))
    assert {p.dtype for p in handle.parameters() if p.requires_grad} == {torch.float32}
    shake(handle)
    assert output(handle, x).dtype == torch.bfloat16
    loss(handle, x).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters() if p.requires_grad)

    base = build("llama")
    quantize(base, "nf4")
    expected = output(base, x)
    handle = get_peft_model(base, make(r=4, target_modules=["o_proj", "mlp"]))
    assert torch.equal(output(handle, x), expected)
    shake(handle)
    loss(handle, x).backward()
    assert all(p.grad is not None for p in handle.parameters() if p.requires_grad)


def test_places_and_scopes() -> None:
    series, parallel = BottleneckConfig(), BottleneckConfig(form="parallel")
    llama, bert = Root(build("llama")), Root(build("bert"))
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert module_paths(llama, "feed_forward", "model", parallel.places) == [f"{b}.mlp" for b in blocks]
    assert module_paths(llama, "blocks", "model", parallel.places) == blocks
    assert module_paths(llama, "class:LlamaMLP", "model", {}) == [f"{b}.mlp" for b in blocks]
    assert module_paths(llama, ["*.mlp", "!*.1.mlp"], "model", {}) == ["model.layers.0.mlp"]
    assert module_paths(llama, r"re:.*\.1\.self_attn", "model", {}) == ["model.layers.1.self_attn"]
    found = module_paths(bert, ["attention", "feed_forward"], "model", series.places)
    assert sorted(found) == sorted(
        f"bert.encoder.layer.{i}.{part}output.dense" for i in range(2) for part in ("attention.", "")
    )
    gpt2 = module_paths(Root(build("gpt2")), ["attention", "feed_forward"], "model", series.places)
    assert sorted(gpt2) == sorted(f"transformer.h.{i}.{part}.c_proj" for i in range(2) for part in ("attn", "mlp"))

    # a second adapter finds the modules that already have one
    inject(llama, BottleneckConfig(r=2), layers="feed_forward")
    inject(llama, BottleneckConfig(r=3), layers=["attention", "feed_forward"], adapter_name="more")
    ranks = {tuple(config.r for config in layer.settings.values()) for layer in layers(llama).values()}
    assert ranks == {(2, 3), (3,)}

    with pytest.raises(ScopeError, match=r"layers='feedforward'.*'feed_forward'"):
        module_paths(bert, "feedforward", "model", series.places)
    with pytest.raises(ScopeError, match=r"layers='feed_forward' names no module"):
        module_paths(bert, "feed_forward", "model", parallel.places)
    with pytest.raises(ScopeError, match=r"'model\.bert\.encoder\.layer\.0' and '.*' inside it"):
        module_paths(bert, ["blocks", "*.output.dense"], "model", {})


@pytest.mark.parametrize("name", ["SeriesAdapter", "ParallelAdapter", "Compacter"])
def test_fit_and_resume(name: str, tmp_path: Path) -> None:
    chosen: Any = "blocks" if name == "ParallelAdapter" else ["*.proj", "*.fc2"]

    def make() -> list[Any]:
        return [getattr(lightning_peft, name)(rank=4, layers=chosen, seed=5)]

    module, trainer = resume(make, tmp_path)
    callback: Any = trainer.callbacks[0]
    config = callback.handle.peft_config["default"]
    assert (config.r, config.seed) == (4, 5)
    expected = {
        "SeriesAdapter": 4 * (2 * 16 * 4 + 4 + 16),
        "ParallelAdapter": 2 * (2 * 16 * 4 + 4 + 16),
        "Compacter": 4 * (2 * 16 + 2 * 4 + 4 + 16) + 4**3,
    }[name]
    sizes = {n: p.numel() for n, p in module.named_parameters() if n in callback.trainable_names and "blocks" in n}
    assert sum(sizes.values()) == expected


@pytest.mark.parametrize("name", ["ParallelAdapter", "Compacter"])
def test_one_bit_adapters(name: str, tmp_path: Path) -> None:
    """Low-bit training of Jie et al. is a method of its own; it takes these adapters like any other."""

    def make() -> list[Any]:
        return [getattr(lightning_peft, name)(rank=4, layers=["*.proj", "*.qkv"]), LowBitAdapters(bits=1)]

    whole, trainer = fit(make(), tmp_path, 4)
    held = {"Compacter": ("up_left", "up_right")}.get(name, ("down", "up"))
    for layer in layers(whole).values():
        for role in held:
            weight = layer.tensor(role, "default")
            assert len(weight.unique()) == 2, "mean and standard deviation, and one bit per value"
            assert layer.tensor(role, "default").grad_fn is not None
    _, half = fit(make(), tmp_path, 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(make(), tmp_path, 4, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[-2:]
    x = next(iter(loader()))[0]
    trained = output(whole.model.eval(), x)
    bake(whole)
    trainer.callbacks[0].export(tmp_path / "peft")  # type: ignore[attr-defined]
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path / "peft").eval()
    torch.testing.assert_close(output(loaded, x), trained, rtol=1e-5, atol=1e-6)


def test_ist_damps_an_adapter_beside_a_whole_attention() -> None:
    from lightning_peft.methods.layers.ist import suppressed

    model, x = TwoOutputs(), torch.randn(2, 3, 8)
    handle = get_peft_model(model, BottleneckConfig(r=3, form="parallel", target_modules=["attention"]))
    shake(handle)
    with torch.no_grad():
        full = handle(x)
        with handle.disable_adapter():
            plain = handle(x)
        with suppressed([model.attention], 0.25):
            torch.testing.assert_close(handle(x), plain + (full - plain) * 0.25)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"activation='rel'.*'relu'"):
        SeriesAdapter(activation="rel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="form='serial'"):
        BottleneckConfig(form="serial")  # type: ignore[arg-type]
    for options in ({"r": 0}, {"scaling": 0.0}, {"width": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            BottleneckConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n=3 does not divide r=64"):
        Compacter(n=3)
    with pytest.raises(ConfigError, match=r"n=5 does not divide the 16 features of blocks\.0\.proj"):
        get_peft_model(build("vit"), CompacterConfig(r=5, n=5, target_modules=["proj"]))
    with pytest.raises(ConfigError, match=r"Name 'self_attn', the whole attention"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), BottleneckConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ConfigError, match="a layer in it"):
        get_peft_model(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), BottleneckConfig(r=2, target_modules="0"))
    handle = get_peft_model(build("vit"), BottleneckConfig(r=2, target_modules=["fc2"], width=8))
    with pytest.raises(ConfigError, match="made for 8 and 8"):
        handle(batch("vit"))
    handle = get_peft_model(build("vit"), CompacterConfig(r=4, target_modules=["proj"]))
    layer: Any = next(iter(layers(handle).values()))
    layer.compacter_rule["default"] = nn.Parameter(torch.empty(0))
    with pytest.raises(UnsupportedStrategy, match="every block"):
        handle(batch("vit"))
