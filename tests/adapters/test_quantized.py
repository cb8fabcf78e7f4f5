"""Adapters on a quantised base: quantised first, whatever is built where; exact resume from a file without the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import TensorDataset

from lightning_peft import DoRA, LoRA, MiSS, QuantizedPrecision
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.core.quantized import is_quantized
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError
from tests.contract.harness import assert_same_weights
from tests.precision.tiny import VOCAB, LoRAModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
]


def data() -> ResumableDataLoader:
    ids = torch.randint(0, VOCAB, (12, 6), generator=torch.Generator().manual_seed(2))
    return ResumableDataLoader(TensorDataset(ids), batch_size=2)


class SaveAll(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


def fit(path: Path, adapter: Any, where: Any, *callbacks: Any, ckpt: Path | None = None) -> pl.LightningModule:
    torch.manual_seed(1 if ckpt is None else 9)
    module = LoRAModule(where)
    run = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        limit_val_batches=0,
        plugins=[QuantizedPrecision("nf4")],
        callbacks=[adapter, *callbacks],
    )
    run.fit(module, data(), ckpt_path=ckpt)
    return module


def trained(module: pl.LightningModule, adapter: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if n in adapter.trainable_names}


@pytest.mark.parametrize("where", ["bare", "configure_bare"])
@pytest.mark.parametrize("make", [lambda: LoRA(2), lambda: MiSS(2)], ids=["lora", "miss"])
def test_quantised_then_injected_and_resumed(make: Any, where: str, tmp_path: Path) -> None:
    adapter = make()
    module = fit(tmp_path, adapter, where, SaveAll(tmp_path))
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    assert layers
    assert all(is_quantized(layer.get_base_layer().weight) for layer in layers)
    values = trained(module, adapter)
    assert all(value.dtype == torch.float32 and bool(value.any()) for value in values.values())
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(values)
    again = make()
    assert_same_weights(trained(fit(tmp_path, again, where, ckpt=tmp_path / "4.ckpt"), again), values)
    with pytest.raises(ConfigError, match="quantised"):
        merge_adapters(adapter.handle)


def test_dora_on_a_quantised_base(tmp_path: Path) -> None:
    adapter = DoRA(2)
    module = fit(tmp_path, adapter, "bare")
    assert any("magnitude" in name for name in trained(module, adapter))
