"""Float32 adapters over a bfloat16 base: what backward keeps, gradients, masters in a fit, and float32 as it was."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft import LoRA, LoRAXS, load_from_checkpoint
from lightning_peft.adapters.master_weights import compute_in_input_dtype
from tests.adapters.test_adapter import MODEL, SaveAll
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]

ROWS, IN, OUT, RANK = 40, 16, 24, 3
BF16 = torch.bfloat16


def saved_bytes(run: Any, parameters: Any) -> int:
    """Bytes of all storages that backward keeps, each once, without those of the parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    del output
    return total


class Two(nn.Module):
    """Two layers of the same input."""

    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(IN, OUT).to(dtype), nn.Linear(IN, OUT, bias=False).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Conv(nn.Module):
    def __init__(self, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Conv2d(3, 4, 3).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def adapted(base: nn.Module, ours: bool = True, **options: Any) -> Any:
    torch.manual_seed(4)
    kind = options.pop("kind", LoraConfig)
    if kind is LoraConfig:
        options = {"r": RANK, "init_lora_weights": False, **options}
    targets = [name for name, _ in base.named_children()]
    model = get_peft_model(base, kind(target_modules=targets, **options))
    if ours:
        compute_in_input_dtype(model)
    return model


def rows(dtype: torch.dtype = BF16, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*(shape or (ROWS, IN)), generator=generator).to(dtype).requires_grad_()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_backward_keeps_what_the_formula_says() -> None:
    model, x = adapted(Two()), rows()
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    assert saved_bytes(lambda: model(x), model.parameters()) == 2 * (ROWS * IN + 2 * ROWS * RANK)
    full = Two()
    assert saved_bytes(lambda: full(x), full.parameters()) == 2 * ROWS * IN
    theirs = adapted(Two(), ours=False)  # the input in float32, once per layer, and the inner activation
    assert saved_bytes(lambda: theirs(x), theirs.parameters()) == 2 * 4 * (ROWS * IN + ROWS * RANK)


def test_a_whole_model_keeps_less_than_full_fine_tuning() -> None:
    ids = torch.randint(0, 19, (8, 16), generator=torch.Generator().manual_seed(1))
    kept = {}
    for name in ("full", "ours", "peft"):
        model = copy.deepcopy(_pretrained(MODEL)).to(BF16)
        if name != "full":
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        if name == "ours":
            compute_in_input_dtype(model)
        kept[name] = saved_bytes(lambda m=model: m(input_ids=ids, use_cache=False).logits, model.parameters())
    assert kept["ours"] < kept["full"] < kept["peft"]


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 5, "use_rslora": True}, {"lora_bias": True}])
def test_gradients_are_those_of_the_plain_formula(options: dict[str, Any]) -> None:
    model, x = adapted(Two(), **options), rows()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.normal_()
    model(x).float().square().sum().backward()
    found, found_x = gradients(model), x.grad
    assert found
    assert {g.dtype for g in found.values()} == {torch.float32}

    layers = {n: model.base_model.model.get_submodule(n) for n in ("one", "two")}
    masters: dict[str, Tensor] = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = rows()
    total: Any = 0
    for n, layer in layers.items():
        prefix = f"base_model.model.{n}"
        plain = functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        bias = masters.get(f"{prefix}.lora_B.default.bias")
        inner = functional.linear(x, masters[f"{prefix}.lora_A.default.weight"].to(BF16))
        outer = functional.linear(
            inner, masters[f"{prefix}.lora_B.default.weight"].to(BF16), None if bias is None else bias.to(BF16)
        )
        total = total + (plain + outer * layer.scaling["default"])
    total.float().square().sum().backward()
    assert all(torch.equal(gradient, masters[name].grad) for name, gradient in found.items())  # type: ignore[arg-type]
    assert torch.equal(found_x, x.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("shape", [(ROWS, IN), (5, 3, 7, 7)], ids=["linear", "convolution"])
def test_close_to_full_precision(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    kind = Two if len(shape) == 2 else Conv
    exact, low = adapted(kind(BF16).float(), ours=False, **options), adapted(kind(), **options)
    exact.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    outputs = []
    for model, dtype in ((exact, torch.float32), (low, BF16)):
        outputs.append(model(rows(BF16, *shape).detach().to(dtype)))
        outputs[-1].float().square().sum().backward()
    assert outputs[1].dtype == BF16
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=0.02, atol=0.02 * outputs[0].abs().max().item())
    expected, found = gradients(exact), gradients(low)
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.5},
        {"kind": AdaLoraConfig, "init_r": 4, "target_r": 2, "total_step": 9, "init_lora_weights": False},
    ],
    ids=["lora", "dora", "dora_dropout", "adalora"],
)
def test_float32_stays_bit_for_bit_what_peft_computes(options: dict[str, Any]) -> None:
    results = []
    for ours in (False, True):
        model = adapted(Two(torch.float32), ours=ours, **dict(options)).train()
        torch.manual_seed(7)
        output = model(rows(torch.float32))
        output.square().sum().backward()
        results.append({"": output.detach(), **gradients(model)})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        if options.get("use_dora"):  # the same terms in another order
            torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(results[1][name], value), name


def test_dora_and_adalora_keep_less_than_peft_and_start_at_the_base() -> None:
    x = rows()
    base = Two()(x)
    for options in (
        {"use_dora": True, "init_lora_weights": True},
        {"kind": AdaLoraConfig, "init_r": 4, "target_r": 2, "total_step": 9},
    ):
        ours, theirs = (adapted(Two(), ours=ours, **dict(options)) for ours in (True, False))
        assert ours(x).dtype == BF16
        assert (ours(x) - base).abs().max() <= 2**-7 * base.abs().max()
        assert saved_bytes(lambda: ours(x), ours.parameters()) < 0.75 * saved_bytes(  # noqa: B023
            lambda: theirs(x),  # noqa: B023
            theirs.parameters(),
        )


def test_what_is_left_to_peft() -> None:
    for options in ({"kasa_config": {}}, {"monteclora_config": {}}):
        model = adapted(Two(), **options)
        assert model.base_model.model.one.cast_input_dtype_enabled
        assert model(rows()).dtype == BF16
    model = adapted(Two())
    assert not model.base_model.model.one.cast_input_dtype_enabled
    options = {"target_modules": ["one"], "init_lora_weights": False, "monteclora_config": {}}
    model.add_adapter("other", LoraConfig(**options))
    compute_in_input_dtype(model)
    assert model.base_model.model.one.cast_input_dtype_enabled
    assert not model.base_model.model.two.cast_input_dtype_enabled
    model.base_model.set_adapter(["default", "other"])
    assert model(rows()).dtype == BF16


def test_copies_and_pickles_stay_independent() -> None:
    model, x = adapted(Two()), rows()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------- in a fit


def fit(path: Path, callback: Any, *more: Any, ckpt: Path | None = None, lr: float = 1e-2) -> TinyModule:
    torch.manual_seed(1 if ckpt is None else 9)
    module = TinyModule(MODEL)
    run = trainer(path, [callback, *more], max_epochs=1, precision="bf16-true")
    run.fit(module, loader(MODEL), loader(MODEL, shuffle=False), ckpt_path=ckpt)
    assert isinstance(run.precision_plugin, HalfPrecision)
    run.validate(module, loader(MODEL, shuffle=False), verbose=False)
    assert "convert_module" not in vars(run.precision_plugin)  # as it was
    return module


def dtypes(module: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    found: tuple[set[torch.dtype], set[torch.dtype]] = (set(), set())
    for name, value in module.state_dict().items():
        found[".lora_" in name].add(value.dtype)
    return found


@pytest.mark.parametrize("make", [lambda: LoRA(2), lambda: LoRAXS(2)], ids=["lora", "lora_xs"])
def test_masters_survive_bf16_true(make: Any, tmp_path: Path) -> None:
    callback = make()
    module = fit(tmp_path, callback, SaveAll(tmp_path))
    assert dtypes(module) == ({BF16}, {torch.float32})
    trained = {n: p for n, p in module.named_parameters() if n in callback.trainable_names}
    assert trained
    assert any(not torch.equal(p, p.to(BF16).float()) for p in trained.values())  # finer than bfloat16 could hold
    points = sorted(tmp_path.glob("*.ckpt"))
    saved = torch.load(points[4], weights_only=True)
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}
    moments = [v for s in saved["optimizer_states"][0]["state"].values() for v in s.values() if v.ndim]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert_same_weights(weights(fit(tmp_path, make(), ckpt=points[4])), weights(module))
    folder = callback.export(tmp_path / "saved")
    base = copy.deepcopy(_pretrained(MODEL)).to(BF16)
    theirs = PeftModel.from_pretrained(base, str(folder))
    ids = next(iter(loader(MODEL, shuffle=False)))[0]
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=0.02, atol=0.02)


def test_a_checkpoint_of_bf16_true_is_rebuilt_on_a_bfloat16_base(tmp_path: Path) -> None:
    class Low(TinyModule):
        def __init__(self, model: str = MODEL) -> None:
            super().__init__(model)
            self.to(BF16)

    module = fit(tmp_path, LoRA(2), SaveAll(tmp_path))
    again = load_from_checkpoint(Low, sorted(tmp_path.glob("*.ckpt"))[-1])
    assert_same_weights(weights(again), weights(module))


def test_any_leading_shape_checkpointing_and_compile() -> None:
    model = adapted(Two())
    results = []
    for kind in ("flat", "deep", "checkpointed", "compiled"):
        x = rows().detach()
        x = x if kind == "flat" else x.reshape(2, 4, 5, IN)
        if kind == "checkpointed":
            output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            output = (torch.compile(model, backend="aot_eager", fullgraph=True) if kind == "compiled" else model)(x)
        model.zero_grad()
        output.float().square().sum().backward()
        results.append({"": output.detach().reshape(ROWS, OUT), **{n: g.clone() for n, g in gradients(model).items()}})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0.02, atol=0.02 * value.abs().max().item())
