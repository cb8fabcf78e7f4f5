"""Each model overlay is parsed and instantiated by a plain LightningCLI, with knobs changed from the command line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_peft
from lightning_peft import WarmupSchedule
from lightning_peft.models.base import PretrainedModule

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
FILES = sorted(CONFIGS.glob("*.yaml"))
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.max_steps=4",
]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls, not ours


def parse(*args: str) -> Any:
    return LightningCLI(
        PretrainedModule,
        args=[*QUIET, *args],
        run=False,
        subclass_mode_model=True,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
    )


def test_every_module_has_an_overlay() -> None:
    assert [path.stem for path in FILES] == ["causal_lm", "sequence_classification", "text_embedding"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_instantiates_with_overrides(path: Path, bert_folder: str, llama_folder: str) -> None:
    folder = llama_folder if path.stem == "causal_lm" else bert_folder
    labels = ["--model.num_labels=3"] if path.stem == "sequence_classification" else []
    cli = parse(
        f"--config={path}",
        f"--model.model_name_or_path={folder}",
        "--model.optimizer.lr=0.125",
        "--model.lr_scheduler.warmup_fraction=0.5",
        *labels,
    )
    module = cli.model
    assert type(module) is getattr(lightning_peft, type(module).__name__)
    assert module.is_built
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0)
    assert isinstance(module._lr_scheduler(optimizer), WarmupSchedule)
    built = module._optimizer(module.parameters())
    assert isinstance(built, torch.optim.AdamW)
    assert (built.defaults["lr"], built.defaults["weight_decay"]) == (0.125, 0.01)


def test_optimizer_and_schedule_by_class_path_on_the_command_line(llama_folder: str) -> None:
    cli = parse(
        "--model=lightning_peft.CausalLM",
        f"--model.model_name_or_path={llama_folder}",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.5",
        "--model.optimizer.momentum=0.9",
        "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "--model.lr_scheduler.step_size=3",
    )
    chosen = cli.model.configure_optimizers()
    assert type(chosen["optimizer"]) is torch.optim.SGD
    assert chosen["optimizer"].param_groups[0]["momentum"] == 0.9
    assert chosen["lr_scheduler"]["scheduler"].step_size == 3
    assert chosen["lr_scheduler"]["interval"] == "step"


def test_only_the_rate_on_the_command_line_keeps_the_default_class() -> None:
    cli = parse(
        "--model=lightning_peft.CausalLM",
        "--model.config={model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,"
        " num_attention_heads: 2, vocab_size: 16}",
        "--model.optimizer.lr=1e-4",
    )
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-4]


def test_every_file_says_how_to_run_it_and_each_knob_has_its_comment() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert any(f"lightning-peft fit --config configs/models/{path.name}" in line for line in lines[:6]), path
        for before, line in itertools.pairwise(lines):
            key = line.strip().partition(":")[0]
            structural = key in {"model", "class_path", "init_args", "optimizer", "lr_scheduler"}
            if not structural and line.strip() and not line.strip().startswith("#"):
                assert before.strip().startswith("#"), f"{path.name}: {key} has no comment"
