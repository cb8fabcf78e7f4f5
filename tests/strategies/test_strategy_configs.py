"""Strategy overlays and the recipes of each scale: parsed by the command line, every knob at its default."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft import FSDP2Strategy
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError, UnsupportedStrategy

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = sorted((CONFIGS / "strategies").glob("*.yaml"))
RECIPES = [CONFIGS / "recipes" / f"{name}.yaml" for name in ("one_gpu", "one_node", "many_nodes")]


def parsed(capsys: pytest.CaptureFixture[str], *paths: Path) -> dict[str, Any]:
    assert main(["fit", *(f"--config={path}" for path in paths), "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def defaults() -> dict[str, Any]:
    return {
        name: p.default for name, p in inspect.signature(FSDP2Strategy.__init__).parameters.items() if name != "self"
    }


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlay(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parsed(capsys, path)["trainer"]["strategy"]
    assert settings["class_path"] == "lightning_peft.FSDP2Strategy"
    own = yaml.safe_load(path.read_text())["trainer"]["strategy"]["init_args"]
    assert own
    changed = {name for name, value in settings["init_args"].items() if name != "timeout" and value != defaults()[name]}
    if path.stem == "fsdp2":
        assert not changed
        assert own.keys() == defaults().keys() - {"process_group_backend", "timeout"}
    else:
        assert changed == {name for name, value in own.items() if value is not None}


def test_nothing_is_parallel_that_was_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    settings = parsed(capsys, CONFIGS / "strategies" / "fsdp2.yaml")["trainer"]["strategy"]["init_args"]
    assert (settings["tensor_parallel_size"], settings["data_parallel_size"]) == (1, "auto")


def test_name_and_class_path() -> None:
    assert "fsdp2" in StrategyRegistry.available_strategies()
    trainer = Trainer(strategy="fsdp2", accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is FSDP2Strategy


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed(capsys, path)
    assert config["method"]["class_path"].endswith("LISA")
    strategy = config["trainer"]["strategy"]
    assert strategy == "auto" if path.stem == "one_gpu" else "fsdp2" in str(strategy).lower()
    assert (config["trainer"]["num_nodes"] == 2) == (path.stem == "many_nodes")
    assert config["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("overlay", ["fsdp2", "fsdp2_hybrid", "fsdp2_tensor_parallel"])
def test_overlays_compose_with_recipes(overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in RECIPES[1:]:
        config = parsed(capsys, recipe, CONFIGS / "strategies" / f"{overlay}.yaml")
        assert config["trainer"]["strategy"]["class_path"] == "lightning_peft.FSDP2Strategy"
        assert config["data"]["class_path"].endswith("PromptResponse")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_replicas": 0}, "num_replicas is a number of processes"),
        ({"data_parallel_size": "all"}, "data_parallel_size is a number of processes"),
        ({"param_dtype": "float16"}, "param_dtype='float16' is none of auto, float32, bfloat16"),
        ({"tensor_parallel_plan": {"a": "colwise"}}, "no effect with tensor_parallel_size=1"),
        ({"blocks": "Block"}, r"blocks is a list of names, such as \['Block'\]"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FSDP2Strategy(**settings)


def test_float16_is_refused() -> None:
    strategy = Trainer(
        strategy=FSDP2Strategy(), accelerator="cpu", devices=1, precision="16-true", logger=False
    ).strategy
    assert isinstance(strategy, FSDP2Strategy)
    with pytest.raises(UnsupportedStrategy, match="bf16-mixed, bf16-true or 32-true"):
        strategy._check_precision()
