"""Each method overlay parses on the command line, shows every knob at its default, and says what each is for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_peft
from lightning_peft.cli import main
from lightning_peft.cli.methods import method_card, method_classes

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
FILES = sorted(CONFIGS.glob("*.yaml"))


def callback(path: Path) -> dict[str, Any]:
    (entry,) = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
    return entry


def test_there_are_overlays() -> None:
    assert {"lisa", "hft", "telly", "bitfit", "last_layer"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_parses_and_makes_the_method(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    (parsed,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    name = callback(path)["class_path"].rpartition(".")[2]
    assert parsed["class_path"].rpartition(".")[2] == name
    cls = method_classes()[name]
    given = callback(path)["init_args"]
    assert {key: parsed["init_args"][key] for key in given} == given
    assert cls(**parsed["init_args"]).settings().keys() >= given.keys()
    assert path.stem.replace("_", "") == name.lower()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_shows_each_knob_with_a_comment(path: Path) -> None:
    text, given = path.read_text(), callback(path)["init_args"]
    name = callback(path)["class_path"].rpartition(".")[2]
    parameters = inspect.signature(getattr(lightning_peft, name)).parameters
    assert set(given) == set(parameters)
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert given[key] == default, key
    lines = text.splitlines()
    assert lines[0].startswith(f"# {name}: ")
    assert any(line.startswith("#   lightning-peft fit --config") for line in lines[:5])
    assert f"configs/methods/{path.name}" in text
    for line in lines:
        if line.startswith("        ") and line.strip().partition(":")[0] in given:
            assert " # " in line, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_overlay_cites_the_cards_paper(path: Path) -> None:
    name = callback(path)["class_path"].rpartition(".")[2]
    cited = path.read_text().splitlines()[0].rpartition(" ")[2]
    assert cited.startswith(("arXiv:", "OpenReview:"))
    assert cited in method_card(name, method_classes()[name]).sections["Paper"]
