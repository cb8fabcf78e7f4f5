"""The ledger's picture and tables, checked against a count step by step."""

import csv
import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_peft import HFT, LISA, TrainingLedger
from lightning_peft.errors import ConfigError
from lightning_peft.report.ledger_plot import LedgerTrack, ledger_figure, share_of_steps, spans

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers:UserWarning")


def track(num_units: int, num_draws: int, period: int = 1, num_active: int = 2, seed: int = 0) -> LedgerTrack:
    draw = random.Random(seed)
    units = tuple(f"model.layers.{i}" for i in range(num_units))
    rows = tuple((d * period, frozenset(draw.sample(units, num_active))) for d in range(num_draws))
    return LedgerTrack("LISA", units, rows, num_draws * period)


def trained_step_by_step(record: LedgerTrack) -> dict[str, list[bool]]:
    """Slow oracle: for each unit and each step of the run, whether it trained."""
    result: dict[str, list[bool]] = {unit: [] for unit in record.units}
    for step in range(record.rows[0][0], record.end_step):
        active = [row for start, row in record.rows if start <= step][-1]
        for unit in record.units:
            result[unit].append(unit in active)
    return result


tracks = st.builds(
    lambda steps, sets, extra: LedgerTrack(
        "M", ("a", "b", "c"), tuple(zip(sorted(steps), sets, strict=False)), max(steps) + extra
    ),
    st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True),
    st.lists(st.frozensets(st.sampled_from("abc")), min_size=8, max_size=8),
    st.integers(0, 9),
)


@settings(deadline=None)
@given(tracks)
def test_spans_and_shares_agree_with_counting(record: LedgerTrack) -> None:
    oracle = trained_step_by_step(record)
    start = record.rows[0][0]
    marked = {unit: [False] * (record.end_step - start) for unit in record.units}
    for unit, first, stop in spans(record):
        assert first < stop
        assert not any(marked[unit][first - start : stop - start])
        marked[unit][first - start : stop - start] = [True] * (stop - first)
    assert marked == oracle
    if record.end_step > start:
        middle = (start + record.end_step) / 2
        for low, high in ((start, record.end_step), (start, middle)):
            whole = [
                sum(max(0.0, min(high, s + 1) - max(low, s)) for s, t in enumerate(oracle[u], start) if t)
                for u in "abc"
            ]
            np.testing.assert_allclose(
                share_of_steps(record, (low, high))[:, 0], np.array(whole) / (high - low), atol=1e-9
            )


def test_spans_are_unbroken() -> None:
    record = LedgerTrack(
        "M", ("a",), ((0, frozenset("a")), (2, frozenset("a")), (4, frozenset()), (6, frozenset("a"))), 7
    )
    assert spans(record) == [("a", 0, 4), ("a", 6, 7)]


@pytest.mark.parametrize(("num_units", "num_draws"), [(6, 1), (6, 12), (32, 479), (80, 10_000), (300, 20)])
def test_figure_shows_every_unit_and_the_whole_run(num_units: int, num_draws: int) -> None:
    pytest.importorskip("matplotlib")
    record = track(num_units, num_draws)
    figure = ledger_figure([record])
    panel, totals = figure.axes[:2]
    assert panel.get_xlim() == (0, num_draws)
    assert panel.get_ylim() == (num_units - 0.5, -0.5)
    image = np.asarray(panel.collections[0].get_array())
    assert image.shape[0] == num_units
    if num_draws < 480:
        assert set(np.unique(image)) <= {0.0, 1.0}
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels[0] == "0"
    assert len(labels) == (num_units if num_units <= 90 else 75)
    width = [bar.get_width() for bar in totals.patches]
    assert sum(width) == pytest.approx(200)
    assert figure.get_figheight() <= 22
    size = 10 if num_units <= 90 else 4  # a row is tall enough to be read
    figure.canvas.draw()
    top, bottom = (panel.transData.transform((0, y))[1] for y in (0, 1))
    assert abs(top - bottom) >= size


def test_labels_leave_out_the_common_path() -> None:
    pytest.importorskip("matplotlib")
    units = ("embeddings", "net.layer.0", "net.layer.1")
    panel = ledger_figure([LedgerTrack("LISA", units, ((0, frozenset(units)),), 5)]).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["embeddings", "0", "1"]
    assert panel.get_ylabel() == "net.layer.*"


def test_two_methods_share_the_panel() -> None:
    pytest.importorskip("matplotlib")
    other = LedgerTrack("HFT", ("model.layers.0.mlp", "model.layers.1.mlp"), ((0, frozenset()),), 8)
    figure = ledger_figure([track(4, 8), other])
    assert len(figure.axes[0].collections) >= 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LISA", "HFT"]


def test_nothing_to_draw_is_an_error() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="empty"):
        ledger_figure([LedgerTrack("LISA", ("a",), ((3, frozenset("a")),), 3)])


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))


class Stack(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.layer = nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.layer(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, *callbacks: object, max_steps: int = 6, logger: bool = False) -> Trainer:
    trainer = Trainer(
        callbacks=list(callbacks),  # pyright: ignore[reportArgumentType]
        max_steps=max_steps,
        default_root_dir=folder,
        logger=logger,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(Stack())
    return trainer


def test_files_tell_what_the_method_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    lisa = LISA(num_layers=2, period_steps=2)
    fit(tmp_path, TrainingLedger(), lisa)
    assert str(tmp_path / "training_ledger.png") in capsys.readouterr().out
    assert (tmp_path / "training_ledger.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "training_ledger.csv").open() as file:
        lines = list(csv.DictReader(file))
    (record,) = json.loads((tmp_path / "training_ledger.json").read_text())
    assert (record["method"], record["end_step"]) == ("LISA", 6)
    names = {unit: set(members) for unit, members in record["units"].items()}
    for step in range(6):
        units = {line["unit"] for line in lines if int(line["first_step"]) <= step < int(line["end_step"])}
        expected = [active for start, active in lisa.history if start <= step][-1]
        assert set().union(*(names[unit] for unit in units)) == expected
    in_order = [unit for unit in record["units"] if unit.startswith("blocks.")]
    assert in_order == [f"blocks.{i}" for i in range(4)]


def test_files_lie_in_the_given_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fit(tmp_path, TrainingLedger(dirpath=str(tmp_path / "deep" / "er"), filename="who"), HFT())
    assert {p.name for p in (tmp_path / "deep" / "er").iterdir()} == {"who.png", "who.csv", "who.json"}


def test_run_without_method_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fit(tmp_path, TrainingLedger())
    (record,) = json.loads((tmp_path / "training_ledger.json").read_text())
    assert record["method"] == "full fine-tuning"
    assert record["rows"] == [[0, sorted(record["units"])]]
    assert {name for unit in record["units"].values() for name in unit} == {n for n, _ in Stack().named_parameters()}


def test_missing_matplotlib_stops_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    steps: list[int] = []
    monkeypatch.setattr(Stack, "training_step", lambda self, batch, i: steps.append(i))
    with pytest.raises(ConfigError, match=r"lightning_peft\[plots\]"):
        fit(tmp_path, TrainingLedger())
    assert steps == []


def test_run_without_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    fit(tmp_path, TrainingLedger(), max_steps=0)
    assert not (tmp_path / "training_ledger.png").exists()
