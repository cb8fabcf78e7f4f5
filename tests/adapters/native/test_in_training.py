from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft import Adapter, ResumableDataLoader
from lightning_peft.adapters.native import LoRASBConfig, calibrate_lora_sb
from tests.adapters.native.models import TARGETS, build, matrix_shape, output
from tests.adapters.native.test_three_factor import METHODS, layers, make

# Lightning 2.6's own, on a machine like this one
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = build("vit")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Calibrate(pl.Callback):
    """What a user of LoRA-SB writes: the first batches decide, unless a checkpoint has."""

    def __init__(self) -> None:
        self.held: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.held = calibrate_lora_sb(
            pl_module, loader(), lambda b: pl_module.training_step(b, 0), max_batches=2, again=False
        )


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    return ResumableDataLoader(TensorDataset(x, torch.arange(24) % 5), batch_size=4)


def fit(callbacks: list[Any], folder: Path, steps: int, ckpt: Path | None = None) -> tuple[Module, pl.Trainer]:
    module = Module()
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize("method", [*METHODS, "lora_sb"])
def test_resume_is_exact_and_the_checkpoint_small(method: str, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        if method == "lora_sb":
            return [Adapter(LoRASBConfig(r=3, target_modules=TARGETS["vit"], learning_rate=1e-2)), Calibrate()]
        return [Adapter(make(method, TARGETS["vit"]))]

    whole, trainer = fit(callbacks(), tmp_path, 6)
    assert len(set(whole.losses)) == 6, "calibration leaves no trace in the list either"
    _, half = fit(callbacks(), tmp_path, 3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = callbacks()
    resumed, _ = fit(second, tmp_path, 6, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[-3:]
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if method == "lora_sb":
        assert second[1].held == {}, "a checkpoint's start is kept"

    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all(f".{method}_" in name for name in saved)
    assert {name for name in saved if name.endswith(f"{method}_A.default")}
    assert len([name for name in saved if name.endswith(f"{method}_R.default")]) == len(layers(whole)) == 5

    callback = trainer.callbacks[0]  # type: ignore[attr-defined]
    callback.export(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path / "peft")
    x = next(iter(loader()))[0]
    assert torch.equal(output(loaded, x), output(whole.model.eval(), x))


@pytest.mark.parametrize("name", ["LoRAXS", "SLoRA", "NLoRA", "IntTune", "LoLDU"])
def test_shortcuts_train_what_their_method_says(name: str, tmp_path: Path) -> None:
    callback = getattr(lightning_peft, name)(rank=3, layers="blocks", seed=5, dropout=0.1)
    module, _ = fit([callback], tmp_path, 1)
    config = callback.handle.peft_config["default"]
    assert (config.r, config.seed, config.dropout) == (3, 5, 0.1)
    count = METHODS[callback.method][2]
    assert type(config) is METHODS[callback.method][0]
    found = {path: layer for path, layer in layers(module).items() if layer.settings}
    assert len(found) == 8, "all linear layers of two blocks, and neither patches nor head"
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    expected = sum(count(*matrix_shape(layer.base_layer), 3) for layer in found.values())
    assert sum(n for name, n in sizes.items() if name in callback.trainable_names and "blocks" in name) == expected
