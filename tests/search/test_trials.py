"""Results of a search: the front, the best, the table, and what is saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import SearchedSubset
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError
from lightning_peft.search import SearchResult, Trial, non_dominated

VALUES = st.integers(0, 4).map(float)


def result(*values: tuple[float, float]) -> SearchResult:
    trials = [
        Trial(i, f"layer {i}", (f"net.{i}",), {"loss": a, "score": b, "num_trainable_parameters": 1234.0})
        for i, (a, b) in enumerate(values)
    ]
    return SearchResult(trials, {"loss": "min", "score": "max"})


@given(points=st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=12))
def test_front_against_brute_force(points: list[tuple[float, float, float]]) -> None:
    expected = []
    for index, point in enumerate(points):
        beaten = False
        for other in points:
            worse = [a > b for a, b in zip(point, other, strict=True)]
            better = [a < b for a, b in zip(point, other, strict=True)]
            beaten |= any(worse) and not any(better)
        if not beaten:
            expected.append(index)
    assert non_dominated(points) == expected
    assert bool(expected) == bool(points)


@given(points=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=10))
def test_front_against_optuna(points: list[tuple[float, float]]) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize", "maximize"])
    for point in points:
        study.tell(study.ask(), point)
    assert sorted(t.number for t in study.best_trials) == sorted(t.number for t in result(*points).front)


def test_no_number_is_never_on_the_front() -> None:
    assert non_dominated([(math.nan, 0.0), (5.0, 5.0)]) == [1]
    assert non_dominated([(math.nan, 0.0)]) == []


def test_best_within_limits() -> None:
    found = result((3.0, 9.0), (1.0, 2.0), (2.0, 5.0), (1.0, 1.0))
    assert [trial.number for trial in found.front] == [1, 2, 0]
    assert found.best().number == 1
    assert found.best("score").number == 0
    assert found.best(limits={"score": 4.0}).number == 2
    assert found.best("score", {"loss": 2.5}).number == 2
    with pytest.raises(ConfigError, match="None of the 4 trial"):
        found.best(limits={"score": 10.0})
    with pytest.raises(ConfigError, match=r"'losss' is no metric.*'loss'"):
        found.best("losss")


def test_table_shows_all_trials_and_marks_the_front() -> None:
    text = str(result((3.0, 9.0), (4.0, 2.0), (2.0, 5.0)))
    rows = [line for line in text.splitlines() if "layer" in line]
    assert [("*" in row) for row in rows] == [True, False, True]
    assert all("1.23 k" in row for row in rows)
    assert "score" in text


def test_method_trains_the_scope_of_the_trial() -> None:
    found = result((3.0, 9.0), (1.0, 2.0))
    assert isinstance(found.method(), SearchedSubset)
    assert found.method().scope == ["net.1"]
    assert found.method(found.trials[0]).scope == ["net.0"]


def test_saved_overlay_is_read_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = SearchResult(result((3.0, 9.0), (1.0, 2.0)).trials, {"loss": "min"}, always=("head",))
    found.save(tmp_path / "found.yaml")
    assert main(["fit", "--config", str(tmp_path / "found.yaml"), "--print_config"]) == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["init_args"]["scope"] == ["net.1"]
    assert callback["init_args"]["always"] == ["head"]
    first = (tmp_path / "found.yaml").read_text().splitlines()[0]
    assert first == "# SearchedSubset: trial 1 of 2, layer 1: loss 1"
