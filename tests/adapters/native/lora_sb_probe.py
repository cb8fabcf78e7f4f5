"""Run by ``test_lora_sb.py`` on two processes: each calibrates on a batch of its own and writes down what it got."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model

from lightning_peft.adapters.native import LoRASBConfig, calibrate_lora_sb
from tests.adapters.native.models import TARGETS, batch, build, loss
from tests.adapters.native.test_three_factor import layers


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = LoRASBConfig(r=3, target_modules=TARGETS["vit"], learning_rate=1e-2, first_step="sgd")
    handle = get_peft_model(build("vit"), config)
    calibrate_lora_sb(handle, [batch("vit", rank)], lambda b: loss(handle, b))
    found = {path: layer.delta_matrix("default").detach() for path, layer in layers(handle).items()}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
