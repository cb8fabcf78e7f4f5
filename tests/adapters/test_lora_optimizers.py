"""LoRA+ and LoRA-FA on the module's own optimizer: against peft's optimizers and the papers' formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from lightning_peft import IST, LISA, LoRA, LoRAFA, LoRAPlus
from lightning_peft.adapters.lora_fa import correction
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError, UnsupportedStrategy
from tests.adapters.test_adapter import SaveAll, fit, logits, pytestmark  # noqa: F401
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, trainer, weights
from tests.contract.harness import loader as shuffled

MODEL = "gqa_decoder"
LAYERS = "*.q_proj"


def without_dropout(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0


class Groups(pl.Callback):
    """The learning rate of each adapter parameter in each step."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        names = {id(p): n for n, p in pl_module.named_parameters()}
        self.rates.append({names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]})


class OwnGroups(TinyModule):
    """The user has two groups and a schedule; no dropout, so that another loop can follow."""

    def __init__(self, model: str = MODEL, **_: Any) -> None:
        super().__init__(model)
        without_dropout(self.model)
        self.head = nn.Linear(19, 19, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch) + self.head.weight.square().mean()

    def configure_optimizers(self) -> Any:
        adapters = [p for n, p in self.named_parameters() if p.requires_grad and "lora" in n]
        head = list(self.head.parameters())
        optimizer = torch.optim.AdamW([{"params": adapters, "lr": 1e-3}, {"params": head, "lr": 1e-2}])
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5), "interval": "step"}
        ]


def test_lora_plus_scales_b_in_every_group_and_through_the_schedule(tmp_path: Path) -> None:
    groups = Groups()
    fit(tmp_path, LoRAPlus(2, lr_ratio=8, layers=LAYERS), groups, module=OwnGroups())
    assert len(groups.rates) == 6
    for step, rates in enumerate(groups.rates):
        assert {name.split(".lora_")[-1][0] for name in rates} >= {"A", "B"}
        for name, rate in rates.items():
            expected = 1e-2 if "head" in name else 8e-3 if "lora_B" in name else 1e-3
            assert rate == pytest.approx(expected * 0.5 ** (step // 2))


class Plain(TinyModule):
    """One group, no schedule, no dropout."""

    def __init__(self, model: str = MODEL, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(model)
        self.options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        without_dropout(self.model)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], **self.options)


def by_hand(make_optimizer: Any, alpha: int = 4) -> dict[str, torch.Tensor]:
    """Train with peft's own optimizer in a plain loop, on the batches that the Trainer has."""
    module = Plain()
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
    handle = get_peft_model(module.model, config)
    optimizer = make_optimizer(handle)
    batches = list(shuffled(MODEL))
    for index in range(0, len(batches), 2):
        window = batches[index : index + 2]
        for batch in window:
            (module.loss(batch) / 2).backward()
        torch.nn.utils.clip_grad_norm_([p for p in handle.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return weights(module)


def test_lora_plus_equals_peft(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LoRAPlus(2, lr_ratio=16, layers=LAYERS), module=Plain())
    expected = by_hand(
        lambda handle: create_loraplus_optimizer(
            handle, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, eps=1e-8, loraplus_weight_decay=0.0
        )
    )
    torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)


def test_lora_fa_equals_peft_but_for_its_rounding(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, LoRAFA(2, layers=LAYERS), module=Plain(lr=1e-2, eps=1e-12, weight_decay=0.1))

    def theirs(handle: Any) -> Any:
        optimizer = create_lorafa_optimizer(handle, r=2, lora_alpha=4, lr=1e-2, weight_decay=0.1)
        optimizer.param_groups[0]["eps"] = 1e-12  # theirs is not corrected for bias
        return optimizer

    expected = by_hand(theirs)
    ours = weights(module)
    for name, value in expected.items():
        if "lora_B" in name:  # peft multiplies in bfloat16: 8 bits
            assert value.abs().max() > 0.03
            torch.testing.assert_close(ours[name], value, rtol=0, atol=5e-4)
        else:
            assert torch.equal(ours[name], value), name


def test_lora_fa_moves_the_weight_along_the_projected_full_gradient(tmp_path: Path) -> None:
    class Module(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    torch.manual_seed(1)
    full = Module()
    batch = next(iter(shuffled(MODEL)))
    full.loss(batch).backward()
    module = Module()
    adapter = LoRAFA(3, alpha=7, layers="*.up_proj", rank_stabilized=True)
    run = trainer(tmp_path, [adapter], max_steps=1, accumulate_grad_batches=1, gradient_clip_val=None)
    run.fit(module, shuffled(MODEL), shuffled(MODEL, shuffle=False))
    scale = 7 / 3**0.5
    for name, parameter in full.model.named_parameters():
        if "up_proj" not in name:
            continue
        values = weights(module.model)
        path = name.removesuffix(".weight")
        a, b = values[f"{path}.lora_A.default.weight"], values[f"{path}.lora_B.default.weight"]
        row_basis = torch.linalg.qr(a.T)[0]  # (in, r), orthonormal
        assert parameter.grad is not None
        expected = -0.5 * parameter.grad @ row_basis @ row_basis.T
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(scale * b @ a, expected, rtol=1e-4, atol=1e-7)


def test_correction_of_more_rows_than_columns_is_the_pseudo_inverse() -> None:
    a = torch.randn(4, 2, dtype=torch.float64)
    matrix = correction(a, 0.5)
    # B's gradient is s G A^T; the corrected step moves W along G itself, since A's rows span everything
    g = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(0.5 * (0.5 * g @ a.T @ matrix) @ a, g)


def test_lora_fa_trains_b_alone_on_convolutions_too(tmp_path: Path) -> None:
    adapter = LoRAFA(2, layers="*.conv")
    module, _ = fit(tmp_path, adapter, SaveAll(tmp_path), data="conv_net")
    assert adapter.trainable_names == {f"model.blocks.{i}.conv.lora_B.default.weight" for i in range(4)}
    assert all(p.requires_grad == (n in adapter.trainable_names) for n, p in module.named_parameters() if "lora" in n)
    saved = torch.load(sorted(tmp_path.glob("*.ckpt"))[0], weights_only=True)
    assert any("lora_A" in name for name in saved["state_dict"])
    grouped = TinyModule("conv_net")
    grouped.model.blocks[0].conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)  # pyright: ignore
    with pytest.raises(UnsupportedStrategy, match="grouped"):
        fit(tmp_path, LoRAFA(2, layers="*.0.conv"), module=grouped, data="conv_net")


@pytest.mark.parametrize(
    "make", [lambda: LoRAPlus(2, options={"use_dora": True}), lambda: LoRAFA(2)], ids=["plus", "fa"]
)
def test_resume_is_exact(make: Any, tmp_path: Path) -> None:
    adapter = make()
    module, run = fit(tmp_path, adapter, SaveAll(tmp_path))
    assert all(p.requires_grad for n, p in module.named_parameters() if n in adapter.trainable_names)
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for n, p in module.named_parameters() if n in adapter.trainable_names}
    points = sorted(tmp_path.glob("*.ckpt"))
    for point in (points[2], points[5]):
        again, _ = fit(tmp_path, make(), ckpt=point)
        assert_same_weights(weights(again), weights(module))
    folder = adapter.export(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(_pretrained(MODEL)), str(folder))
    assert torch.equal(logits(loaded), logits(module.model))


def test_beside_another_method(tmp_path: Path) -> None:
    adapter, lisa = LoRAFA(2, layers="*.self_attn.*"), LISA(1, period_steps=2, scope="*.mlp.*.weight", always=())
    fit(tmp_path, adapter, lisa)
    assert all("lora_B" in name for name in adapter.trainable_names)
    assert all("mlp" in name for name in lisa.trainable_names)
    adapter, ist = LoRAFA(2, layers=LAYERS), IST(0.5, score_period_steps=2, scope="adapters")
    fit(tmp_path, adapter, ist)
    assert not adapter.trainable_names
    assert len(ist.selectable) == 4
    assert all("lora_B" in name for name in ist.selectable)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        LoRAPlus(lr_ratio=0.5)
    with pytest.raises(ConfigError, match=r"no option 'use_dorra'.*use_dora"):
        LoRAPlus(options={"use_dorra": True})
    with pytest.raises(ConfigError, match="LossDriver"):
        fit(tmp_path, LoRAPlus(2, options={"kasa_config": {"beta": 0.1, "gamma": 0.1}}))
    with pytest.raises(ConfigError, match="embedding"):
        fit(tmp_path, LoRAFA(2, layers="embeddings"))


@pytest.mark.parametrize(
    ("name", "option", "rates"),
    [("lora_plus", "--trainer.callbacks.lr_ratio=4", {1e-3, 4e-3}), ("lora_fa", "--trainer.callbacks.rank=3", {1e-3})],
)
def test_from_the_command_line(
    name: str, option: str, rates: set[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        found.extend(group["lr"] for group in self.param_groups)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": "false", "accelerator": "cpu", "max_steps": "1", "limit_val_batches": "0"}
    arguments = [
        "fit",
        f"--config={Path(__file__).parents[2] / 'configs' / 'methods' / name}.yaml",
        option,
        "--model=tests.adapters.test_lora_optimizers.Plain",
        "--data=tests.methods.tiny_data.TinyData",
        *(f"--trainer.{key}={value}" for key, value in quiet.items()),
    ]
    assert main(arguments) == 0
    assert set(found) == rates


def test_lora_fa_has_half_of_loras_parameters(tmp_path: Path) -> None:
    adapter = LoRAFA(3)
    module, _ = fit(tmp_path, adapter)
    own = sum(p.numel() for n, p in module.named_parameters() if n in adapter.trainable_names)
    bases = [p for n, p in module.named_parameters() if n.endswith("base_layer.weight")]
    assert len(bases) == 28
    assert own == sum(3 * base.shape[0] for base in bases)  # rank * out


def test_lora_fa_keeps_no_inputs_for_the_backward_pass(tmp_path: Path) -> None:
    class Weighs(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            parameters = {p.untyped_storage().data_ptr() for p in self.parameters()}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return super().training_step(batch, batch_idx)

    sizes = []
    for adapter in (LoRA(2, layers="*.down_proj"), LoRAFA(2, layers="*.down_proj")):
        kept: dict[int, int] = {}
        run = trainer(tmp_path, [adapter], max_steps=1, accumulate_grad_batches=1)
        run.fit(Weighs(), shuffled(MODEL), shuffled(MODEL, shuffle=False))
        sizes.append(sum(kept.values()))
    inputs = 4 * 2 * 7 * 12 * 4  # layers, rows, tokens, features, bytes
    assert sizes[0] - sizes[1] == inputs
