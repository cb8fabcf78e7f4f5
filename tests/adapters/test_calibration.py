"""Starts from data against oracles in numpy, without a trace, once; and files that give the start back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_peft import EVA, Adapter, CorDA, LoRA, LoRAGA, LoRASB, ResumableDataLoader, load_from_checkpoint
from lightning_peft.adapters import calibration
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY
from lightning_peft.core.trainable import parameter_fingerprints
from lightning_peft.errors import BaseMismatch, ConfigError, UnsupportedStrategy
from tests.adapters import calibration_probe
from tests.adapters.test_quantized import SaveAll, trained
from tests.adapters.test_quantized import fit as fit_quantized
from tests.contract.harness import TinyModule, assert_same_weights, trainer, weights
from tests.distributed.launch import launch
from tests.oracles.three_factor import lora_sb_delta

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]

MODEL = "gqa_decoder"
LAYERS = ["*.q_proj", "*.down_proj"]

STARTS: dict[str, Any] = {
    "eva": lambda **kw: EVA(2, rho=2, tau=0.9, layers=LAYERS, num_batches=3, **kw),
    "corda": lambda **kw: CorDA(2, layers=LAYERS, num_batches=3, **kw),
    "lora_ga": lambda **kw: LoRAGA(2, layers=LAYERS, num_batches=3, **kw),
    "lora_sb": lambda **kw: LoRASB(2, learning_rate=1e-2, layers=LAYERS, num_batches=3, **kw),
}


def data(num_samples: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randint(0, 19, (num_samples, 7), generator=generator), torch.zeros(num_samples))


def fit(
    path: Path,
    *callbacks: Any,
    module: Any = None,
    loader: Any = None,
    ckpt: Any = None,
    **kw: Any,
) -> tuple[Any, pl.Trainer]:
    torch.manual_seed(1 if ckpt is None else 9)
    module = module or TinyModule(MODEL)
    run = trainer(path, callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **kw})
    run.fit(module, ResumableDataLoader(data(), batch_size=4) if loader is None else loader, ckpt_path=ckpt)
    return module, run


def start(path: Path, callback: Adapter, module: Any = None, loader: Any = None, **kw: Any) -> dict[str, Any]:
    """Path -> layer of the target, as training would begin."""
    fit(path, callback, module=module, loader=loader, max_steps=0, **kw)
    base: Any = callback.handle.get_base_model()
    return {name: layer for name, layer in base.named_modules() if hasattr(layer, "base_layer")}


def one_batch() -> DataLoader:
    """All samples in one batch, so that it does not matter in which order they are drawn."""
    return DataLoader(data(4), batch_size=4)


def seen_by_hand(path: str, gradient: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (rows, in), weight and its gradient of a layer of the plain model in evaluation mode, in float64."""
    module = TinyModule(MODEL).eval()
    layer: Any = module.model.get_submodule(path)
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    module.loss(data(4).tensors).backward()
    handle.remove()
    grads = layer.weight.grad.double().numpy()
    return (
        found[0].detach().reshape(-1, layer.in_features).double().numpy(),
        layer.weight.detach().double().numpy(),
        grads,
    )


# ---------------------------------------------------------------------- what peft computes


def test_eva_starts_from_the_principal_directions_of_the_inputs(tmp_path: Path) -> None:
    callback = EVA(2, rho=1, layers=LAYERS)
    layers = start(tmp_path, callback, loader=one_batch())
    assert len(layers) == 8
    for path, layer in layers.items():
        X, W, _ = seen_by_hand(path)
        directions = np.linalg.svd(X - X.mean(0))[2][:2]
        A = layer.lora_A["default"].weight.detach().double().numpy()
        np.testing.assert_allclose(np.abs((A * directions).sum(1)), 1, atol=1e-3, err_msg=path)
        assert not layer.lora_B["default"].weight.any()
        np.testing.assert_array_equal(layer.base_layer.weight.detach().double().numpy(), W)


def test_eva_gives_ranks_to_the_layers_that_vary_most(tmp_path: Path) -> None:
    callback = EVA(2, rho=2, layers=["*.o_proj", "*.down_proj"])
    layers = start(tmp_path, callback, loader=one_batch())
    shares = []
    for path in (f"model.layers.{i}.{name}" for i in range(4) for name in ("self_attn.o_proj", "mlp.down_proj")):
        X = seen_by_hand(path)[0]
        variances = np.linalg.svd(X - X.mean(0), compute_uv=False) ** 2
        shares += [(share, path) for share in (variances / variances.sum())[:4]]
    expected: dict[str, int] = {}
    for _, path in sorted(shares, reverse=True)[:16]:
        expected[path] = expected.get(path, 0) + 1
    assert {path: layer.r["default"] for path, layer in layers.items()} == expected
    assert len(set(expected.values())) > 1, "some layers get more than others"


def test_corda_decomposes_under_the_covariance_of_the_inputs(tmp_path: Path) -> None:
    for mode, kept in (("ipm", slice(None, 2)), ("kpm", slice(-2, None))):
        layers = start(tmp_path, CorDA(2, mode=mode, layers=LAYERS), loader=one_batch())  # type: ignore[arg-type]
        for path, layer in layers.items():
            X, W, _ = seen_by_hand(path)
            X = X / abs(X.max())
            C = X.T @ X
            C += 0.01 * np.diag(C).mean() * np.eye(len(C))
            U, S, Vh = np.linalg.svd(W @ C, full_matrices=False)
            expected = (U[:, kept] * S[kept]) @ Vh[kept] @ np.linalg.inv(C)
            A, B = (m["default"].weight.detach().double().numpy() for m in (layer.lora_A, layer.lora_B))
            np.testing.assert_allclose(B @ A, expected, rtol=1e-3, atol=1e-3, err_msg=path)
            now = layer.base_layer.weight.detach().double().numpy()
            np.testing.assert_allclose(now + B @ A, W, rtol=0, atol=1e-6)
            assert np.abs(now - W).max() > 1e-3 * np.abs(expected).max()


def test_lora_ga_starts_from_the_singular_vectors_of_the_gradient(tmp_path: Path) -> None:
    module = TinyModule(MODEL)
    module.model.eval()  # its attention has dropout
    layers = start(tmp_path, LoRAGA(2, layers=LAYERS, gamma=4), module=module, loader=one_batch())
    for path, layer in layers.items():
        _, W, G = seen_by_hand(path)
        U, S, Vh = np.linalg.svd(G)
        A, B = (m["default"].weight.detach().double().numpy() for m in (layer.lora_A, layer.lora_B))
        np.testing.assert_allclose(np.abs((A * Vh[:2]).sum(1)), 1, atol=1e-3, err_msg=path)
        expected = np.abs(U[:, 2:4] * S[2:4] * len(W) ** 0.25 / 4**0.5)
        np.testing.assert_allclose(np.abs(B), expected, rtol=2e-2, atol=1e-5 + 1e-3 * expected.max(), err_msg=path)
        np.testing.assert_allclose(layer.base_layer.weight.detach().double().numpy() + 2 * B @ A, W, rtol=0, atol=1e-6)


def test_lora_sb_starts_from_the_first_step(tmp_path: Path) -> None:
    module = TinyModule(MODEL)
    module.model.eval()
    layers = start(
        tmp_path, LoRASB(2, learning_rate=1.0, first_step="sgd", layers=LAYERS), module=module, loader=one_batch()
    )
    for path, layer in layers.items():
        G = seen_by_hand(path)[2]
        delta = layer.delta_matrix("default").detach().double().numpy()
        np.testing.assert_allclose(delta, lora_sb_delta(G, 2, 1.0, sign=False), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- any batch, no trace


class Texts(Dataset[dict[str, Any]]):
    """Dictionaries with padding of some token, and a string that no library expects."""

    def __init__(self, filler: int, label: int = 0) -> None:
        self.filler, self.label = filler, label

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = data(4).tensors[0][index].clone()
        mask = torch.arange(7) < 4 + index
        tokens[~mask] = self.filler
        labels = torch.where(mask, tokens, -100)
        labels[0] = -100
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels, "id": f"text {index}"}


class OfTexts(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert all(name.startswith("text") for name in batch.pop("id"))
        return self.model(**batch, use_cache=False).loss


class OfPairs(TinyModule):
    """Two texts in each sample, which run one after the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.zeros(())
        for texts in batch:
            logits = self.model(texts["input_ids"], texts["attention_mask"], use_cache=False).logits
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), texts["labels"].flatten())
        return loss


class Pairs(Texts):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), super().__getitem__(3 - index)


@pytest.mark.parametrize("module", [OfTexts, OfPairs])
@pytest.mark.parametrize("name", ["eva", "corda"])
def test_padding_does_not_count(name: str, module: type[TinyModule], tmp_path: Path) -> None:
    found = []
    for filler in (3, 11):
        texts = Texts(filler) if module is OfTexts else Pairs(filler)
        layers = start(tmp_path, STARTS[name](), module=module(MODEL), loader=DataLoader(texts, batch_size=4))
        found.append({path: layer.lora_A["default"].weight.detach() for path, layer in layers.items()})
    assert_close(found[0], found[1])


def test_eva_leaves_positions_without_a_label_out(tmp_path: Path) -> None:
    (layer, *_) = start(
        tmp_path,
        EVA(1, rho=1, layers="*.layers.0.*.q_proj"),
        module=OfTexts(MODEL),
        loader=DataLoader(Texts(3), batch_size=4),
    ).values()
    batch = [Texts(3)[index] for index in range(4)]
    model = TinyModule(MODEL).eval().model
    rows: list[Tensor] = []
    q_proj: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    q_proj.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].detach()))
    model(torch.stack([each["input_ids"] for each in batch]), use_cache=False)
    X = rows[0][torch.stack([each["labels"] != -100 for each in batch])].double().numpy()
    assert len(X) == 4 + 5 + 6 + 7 - 4
    direction = np.linalg.svd(X - X.mean(0))[2][0]
    A = layer.lora_A["default"].weight.detach().double().numpy()[0]
    assert abs(abs(A @ direction) - 1) < 1e-3


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)


class TwoLoaders(pl.LightningDataModule):
    """Makes its data in ``setup``, draws a split there, and gives batches of two loaders."""

    def setup(self, stage: str) -> None:
        self.first, self.second = torch.utils.data.random_split(data(), [8, 4])

    def train_dataloader(self) -> Any:
        return {"first": DataLoader(self.first, batch_size=2), "second": DataLoader(self.second, batch_size=1)}


class OfTwoLoaders(TinyModule):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((batch["first"][0].tolist(), batch["second"][0].tolist()))
        return self.loss(batch["first"]) + self.loss(batch["second"])


@pytest.mark.parametrize("name", STARTS)
def test_batches_of_a_data_module(name: str, tmp_path: Path) -> None:
    seen = []
    for callback in (STARTS[name](), LoRA(2, layers=LAYERS)):
        module = OfTwoLoaders(MODEL)
        torch.manual_seed(4)
        trainer(tmp_path, [callback], max_epochs=1).fit(module, datamodule=TwoLoaders())
        seen.append(module.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


class Noisy(pl.LightningModule):
    """Running statistics, dropout, lists and counts; draws from every global random state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 6)
        )
        self.model[1].eval()
        self.log_of_draws: list[Any] = []
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        self.count += 1
        self.log_of_draws.append((x.tolist(), float(torch.rand(())), random.random(), float(np.random.rand())))
        self.log("loss", 0.0)
        return (self.model(x) - x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


@pytest.mark.filterwarnings("ignore:Found 1 module:UserWarning")  # the frozen norm
@pytest.mark.parametrize("name", STARTS)
def test_a_pass_leaves_no_trace(name: str, tmp_path: Path) -> None:
    def run(callback: Adapter) -> Noisy:
        module = Noisy()
        random.seed(5)
        np.random.seed(5)
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(x), batch_size=8, shuffle=True)  # by the global random state
        fit(tmp_path, callback, module=module, loader=loader)
        return module

    def make(layers: list[str]) -> Adapter:
        kind = {"eva": EVA, "corda": CorDA, "lora_ga": LoRAGA, "lora_sb": LoRASB, "lora": LoRA}[name]
        return kind(1, layers=layers)

    expected, module = run(LoRA(1, layers=["class:Linear"])), run(make(["class:Linear"]))
    assert module.log_of_draws == expected.log_of_draws
    assert module.count == 3
    norms = [each.model[1] for each in (expected, module)]
    for key, value in norms[0].state_dict().items():
        assert torch.equal(value, norms[1].state_dict()[key])
    for left, right in zip(module.model.modules(), module.model.modules(), strict=True):
        assert left.training == right.training
    assert not norms[1].training
    assert module.model[2].training
    layers = [layer for layer in module.model.modules() if isinstance(layer, nn.Linear)]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks for layer in layers)
    assert not any("peft" in key or key in ("eigens", "covariance_matrix") for la in layers for key in vars(la))


# ---------------------------------------------------------------------- once, and from files


class SaveSecond(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*had a gradient but did not change:UserWarning")  # rounded away in bfloat16
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", STARTS)
def test_files_give_the_start_back(name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = tmp_path / "second.ckpt"
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 1}
    callback = STARTS[name]()
    module, run = fit(tmp_path, callback, SaveSecond(point), **options)
    final = weights(module)
    saved = torch.load(point, weights_only=True)
    assert not any("base_layer" in key for key in saved["state_dict"])
    for key, mark in saved[CHECKPOINT_KEY]["base"].items():  # of the base as it was, where it was changed
        changed = name in ("corda", "lora_ga") and "base_layer" in key
        assert (parameter_fingerprints([final[key]]) != [mark]) == changed, key

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibration.FromBatches, "put_in", never)
    run.validate(module, DataLoader(data(), batch_size=4), verbose=False)
    assert_same_weights(weights(module), final)
    resumed, _ = fit(tmp_path, STARTS[name](), ckpt=point, **options)
    assert_same_weights(weights(resumed), final)
    if precision == "32-true":
        run.save_checkpoint(tmp_path / "end.ckpt")
        loaded = load_from_checkpoint(TinyModule, tmp_path / "end.ckpt", model=MODEL)
        assert_same_weights(weights(loaded), final)
        again = trainer(tmp_path, [STARTS[name]()])
        fresh = TinyModule(MODEL)
        again.validate(fresh, DataLoader(data(), batch_size=4), ckpt_path=str(tmp_path / "end.ckpt"), verbose=False)
        assert_same_weights(weights(fresh), final)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_another_base_or_other_settings_are_refused(name: str, tmp_path: Path) -> None:
    point = tmp_path / "second.ckpt"
    fit(tmp_path, STARTS[name](), SaveSecond(point))
    other = TinyModule(MODEL)
    with torch.no_grad():
        other.model.get_submodule("model.layers.0.self_attn.q_proj").weight[0, 0] += 0.1  # type: ignore[index]
    with pytest.raises(BaseMismatch):
        fit(tmp_path, STARTS[name](), module=other, ckpt=point)
    with pytest.raises(ConfigError, match=r"other settings \(.*\br\)"):
        fit(tmp_path, type(STARTS[name]())(3, **_other_options(name)), ckpt=point)
    plain = tmp_path / "plain.ckpt"
    fit(tmp_path, LoRA(2, layers=LAYERS), SaveSecond(plain))
    with pytest.raises(ConfigError, match="holds no start"):
        fit(tmp_path, STARTS[name](), ckpt=plain)
    if name != "eva":  # a module in memory that was calibrated on other data
        module, _ = fit(tmp_path, STARTS[name](seed=1))
        with pytest.raises(BaseMismatch):
            fit(tmp_path, STARTS[name](seed=1), module=module, ckpt=point)


def _other_options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"layers": LAYERS, "alpha": 4} if name != "corda" else {"layers": LAYERS}
    return options | ({"rho": 2, "tau": 0.9} if name == "eva" else {})


@pytest.mark.parametrize("name", STARTS)
def test_stages_before_a_fit_see_the_base(name: str, tmp_path: Path) -> None:
    module, callback = TinyModule(MODEL), STARTS[name]()
    before = weights(module)
    run = trainer(tmp_path, [callback], max_epochs=1)
    run.validate(module, DataLoader(data(), batch_size=4), verbose=False)
    assert_same_weights(weights(module), before)
    with pytest.raises(ConfigError, match="none has run yet"):
        _ = callback.handle
    torch.manual_seed(1)
    run.fit(module, ResumableDataLoader(data(), batch_size=4))
    expected, _ = fit(tmp_path, STARTS[name](), limit_val_batches=2)
    assert_same_weights(weights(module), weights(expected))


def test_the_generic_form_does_the_same(tmp_path: Path) -> None:
    generic = Adapter(
        "lora",
        {"r": 2, "lora_alpha": 2, "init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}},
        layers=LAYERS,
        calibration_batches=3,
    )
    assert_same_weights(weights(fit(tmp_path, generic)[0]), weights(fit(tmp_path, STARTS["corda"]())[0]))


@pytest.mark.parametrize("name", STARTS)
def test_exported_and_merged_over_the_original_base(name: str, tmp_path: Path) -> None:
    callback = STARTS[name]()
    module, _ = fit(tmp_path, callback)
    pretrained = TinyModule(MODEL).model.eval()

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=data().tensors[0][:4], use_cache=False).logits

    expected = logits(module.model)
    assert (expected - logits(pretrained)).abs().max() > 1e-4
    loaded = PeftModel.from_pretrained(pretrained, callback.export(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merge_adapters(callback.handle)), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- mistakes


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from data().tensors[0]


class PartlyUsed(TinyModule):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model.spare = nn.Linear(8, 8)


class Broken(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise KeyError("the user's own")


@pytest.mark.parametrize("name", STARTS)
def test_mistakes_are_told_before_training(name: str, tmp_path: Path) -> None:
    make = STARTS[name]
    with pytest.raises(ConfigError, match=r"starts from data.*data set with a length"):
        fit(tmp_path, make(), loader=DataLoader(Stream(), batch_size=4))
    with pytest.raises(KeyError, match="the user's own"):
        fit(tmp_path, make(), module=Broken(MODEL))
    module = PartlyUsed(MODEL)
    before = weights(module)
    with pytest.raises(ConfigError, match=r"does not (use|depend on) 1 .*spare"):
        fit(tmp_path, type(make())(2, layers=["*.q_proj", "*.spare"]), module=module)
    assert_same_weights(weights(module), before)
    assert all(p.requires_grad for p in module.parameters())
    if name != "lora_sb":
        with pytest.raises(ConfigError, match="List it before the others"):
            fit(tmp_path, LoRA(2), make(adapter_name="second"))
        with pytest.raises(ConfigError, match="num_batches=0"):
            type(make())(2, num_batches=0)


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"rank 5 is too large.*twice"):
        fit(tmp_path, LoRAGA(5, layers=LAYERS))
    with pytest.raises(ConfigError, match="rank 9 is too large"):
        fit(tmp_path, CorDA(9, layers=LAYERS))
    config: dict[str, Any] = {"r": 2, "init_lora_weights": "lora_ga", "target_modules": ["lm_head"]}
    with pytest.raises(ConfigError, match="tied"):
        fit(tmp_path, Adapter("lora", config), module=TinyModule("tied_decoder"))
    with pytest.raises(ConfigError, match="larger batches"):
        fit(tmp_path, EVA(2, rho=4, layers=LAYERS), loader=DataLoader(data(), batch_size=1))
    with pytest.raises(ConfigError, match=r"4 ranks .* smaller rank or rho"):
        fit(tmp_path, EVA(2, rho=2, layers=LAYERS), loader=DataLoader(data(), batch_size=1))
    monkeypatch.setattr(calibration, "_MOST_ROUNDS", 3)
    with pytest.raises(ConfigError, match=r"still turn after 3 rounds over 3 .*smaller tau"):
        fit(tmp_path, EVA(2, tau=1, layers=LAYERS[:1], num_batches=3))
    with pytest.raises(ConfigError, match="rho"):
        EVA(rho=0.5)
    with pytest.raises(ConfigError, match="mode='imp'"):
        CorDA(mode="imp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"direction='ArA'.*'ArBr'"):
        LoRAGA(direction="ArA")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        config = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}, "target_modules": ["q_proj"]}
        with pytest.raises(ConfigError, match="CUDA or XPU"):
            fit(tmp_path, Adapter("lora", config))


def test_strategies_that_shard_before_are_refused() -> None:
    module, run = TinyModule(MODEL), Mock(strategy=Mock(spec=FSDPStrategy))
    with pytest.raises(UnsupportedStrategy, match=r"before it has sharded.*FSDP2Strategy"):
        calibration.FromBatches(run, module, 1, 0, "EVA").put_in(module, module.model, None, "default", Mock())


@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_on_a_quantised_base(tmp_path: Path) -> None:
    adapters: list[Any] = [EVA(2, layers=["*.q_proj", "*.o_proj"]), LoRASB(2, layers=["*.q_proj"])]
    for make in adapters:
        module = fit_quantized(tmp_path, make, "bare", SaveAll(tmp_path))
        values = trained(module, make)
        again = type(make)(2, layers=make.layers)
        resumed = fit_quantized(tmp_path, again, "bare", ckpt=tmp_path / "2.ckpt")
        assert_same_weights(trained(resumed, again), values)
    for kind in (CorDA, LoRAGA):
        with pytest.raises(ConfigError, match="is quantised"):
            fit_quantized(tmp_path, kind(2, layers=["*.q_proj"]), "bare")


# ---------------------------------------------------------------------- several processes


@pytest.mark.distributed
def test_two_processes_start_as_one(tmp_path: Path) -> None:
    launch(Path(calibration_probe.__file__), str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys()
    for name in STARTS:
        module = TinyModule(MODEL)
        fit(tmp_path, STARTS[name](), module=module, loader=DataLoader(data(24), batch_size=4), max_steps=0)
        expected = weights(module)
        for rank in ranks:
            for form in ("ddp", "fsdp2"):
                assert_same_weights(rank[f"{name}/{form}"], expected)
            assert_same_weights(rank[f"{name}/resumed"], rank[f"{name}/trained"])
        assert ranks[0][f"{name}/trained"].keys() == expected.keys()
    assert all("no weights yet" in rank["meta"] for rank in ranks)
