"""The package as a whole: light imports, public names, errors, and metadata that holds together."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_peft
from lightning_peft import errors
from lightning_peft.errors import LightningPeftError, nearest, suggest

ROOT = Path(__file__).parents[1]
METADATA = metadata.metadata("lightning_peft")
REQUIREMENTS = [Requirement(line) for line in METADATA.get_all("Requires-Dist") or []]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def test_import_is_light() -> None:
    code = "import sys, lightning_peft; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("'torch'", "'lightning'", "'transformers'", "'peft'", "'bitsandbytes'", "'matplotlib'"):
        assert heavy not in loaded
    assert "'lightning_peft'" in loaded


@pytest.mark.parametrize("name", sorted(lightning_peft._PUBLIC))
def test_public_name(name: str) -> None:
    value = getattr(lightning_peft, name)
    assert value.__name__ == name
    assert value.__module__ == lightning_peft._PUBLIC[name]
    assert value.__doc__
    assert name in dir(lightning_peft)
    assert name in lightning_peft.__all__


def test_public_modules_say_what_they_export() -> None:
    for name, module in lightning_peft._PUBLIC.items():
        assert name in importlib.import_module(module).__all__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LISSA"):
        _ = lightning_peft.LISSA
    with pytest.raises(ImportError):
        from lightning_peft import LISSA  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_are_a_family_and_builtin() -> None:
    family = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, LightningPeftError)]
    assert len(family) >= 7
    for error in family:
        assert error is LightningPeftError or issubclass(error, (ValueError, RuntimeError))
        assert error.__name__ in errors.__all__


def test_nearest_ignores_case_and_keeps_the_best_first() -> None:
    assert nearest("lisaa", ["HFT", "LISA", "LISAX"])[0] in ("LISA", "LISAX")
    assert nearest("max_stepz", ["max_epochs", "max_steps"], limit=1) == ["max_steps"]
    assert nearest("qqq", ["LISA"]) == []


def test_suggest_always_says_something_useful() -> None:
    assert suggest("LISSA", ["LISA", "HFT"]) == "Did you mean 'LISA'?"
    assert suggest("qqq", ["LISA", "HFT"]) == "Valid choices: 'LISA', 'HFT'."
    assert suggest("qqq", []) == ""


def test_version_is_the_installed_one() -> None:
    assert lightning_peft.__version__ == METADATA["Version"]


def test_typed_and_licensed() -> None:
    assert (ROOT / "lightning_peft" / "py.typed").exists()
    assert METADATA["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_command_is_installed() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="lightning-peft")
    assert script.load() is importlib.import_module("lightning_peft.cli").main


def test_torch_is_pinned_and_pins_meet_the_bounds() -> None:
    pins = constraints()
    assert str(pins["torch"].specifier) == "==2.13.0"
    for requirement in REQUIREMENTS:
        pin = pins.get(requirement.name.lower().replace("_", "-"))
        if pin is not None:
            (specifier,) = pin.specifier
            assert specifier.version in requirement.specifier, f"{pin} is outside {requirement}"


def test_core_requirements_have_lower_bounds_and_pins() -> None:
    core = [requirement for requirement in REQUIREMENTS if requirement.marker is None]
    assert len(core) >= 9
    for requirement in core:
        assert any(s.operator == ">=" for s in requirement.specifier), requirement
        assert requirement.name.lower().replace("_", "-") in constraints(), requirement
