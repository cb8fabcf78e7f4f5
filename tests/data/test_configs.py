"""Each data overlay is parsed and instantiated by a plain LightningCLI, and says what the class says."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_peft
from lightning_peft.data.base import TokenisedDataModule
from tests.data.resume_probe import Recorder

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
FILES = sorted(CONFIGS.glob("*.yaml"))
CLASSES = ["ChatMessages", "LabelledText", "PromptResponse", "PythonCodeSearch", "TextFiles", "TextPairs"]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls, not ours


def parse(*args: str) -> Any:
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    return LightningCLI(
        Recorder,
        pl.LightningDataModule,
        args=[*quiet, *args],
        run=False,
        subclass_mode_data=True,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
    ).datamodule


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["data"]


def test_every_datamodule_has_an_overlay() -> None:
    assert sorted(settings(path)["class_path"].split(".")[-1] for path in FILES) == CLASSES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_instantiates_with_overrides(path: Path) -> None:
    data = parse(f"--config={path}", "--data.batch_size=3", "--data.seed=7")
    assert type(data) is getattr(lightning_peft, settings(path)["class_path"].split(".")[-1])
    assert isinstance(data, TokenisedDataModule)
    assert (data.batch_size, data.seed) == (3, 7)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_has_every_knob_at_its_default_with_a_comment(path: Path) -> None:
    text = path.read_text()
    given = settings(path)["init_args"]
    cls = getattr(lightning_peft, settings(path)["class_path"].split(".")[-1])
    defaults = {name: knob.default for name, knob in inspect.signature(cls).parameters.items()}
    assert {**defaults, **given} | {"train_path": None} == defaults | {"train_path": None}
    assert set(given) == set(defaults)
    assert text.startswith("# ")
    assert "\n#   lightning-peft fit --config" in text
    knobs = [line for line in text.splitlines() if line.startswith("    ") and not line.strip().startswith("#")]
    assert len(knobs) == len(given)
    assert [line for line in knobs if " # " not in line] == []
    assert "Args:" in (cls.__doc__ or "")
    for name in defaults:
        assert f"        {name}: " in cls.__doc__, name
