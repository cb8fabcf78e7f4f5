"""The ledger of a run as a picture: which layer trained when.

The x axis counts optimizer steps, the y axis lists the methods' units in model order. A run with few draws is drawn
exactly, one cell per draw. A run with more draws than fit is cut into equal bins of steps, and the depth of the colour
is the share of the bin's steps in which the unit trained (the darkest is named in the title), so that ten thousand
draws stay readable and true. The bars at the right give each unit's share of all steps.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback
from lightning_peft.report.console import show
from lightning_peft.report.methods import find_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LedgerTrack", "TrainingLedger", "ledger_figure", "share_of_steps", "spans"]

_MAX_EXACT_DRAWS = 480
_BINS = 240
_MAX_LABELS = 90
_COLOURS = ("#0b4f8a", "#b3541e", "#1b7a4b", "#7a3b8f")


@dataclass(frozen=True)
class LedgerTrack:
    """What one method did, ready to be drawn.

    Args:
        label: The method's name.
        units: Unit names in the order they are drawn, the first at the top.
        rows: ``(optimizer step, units that train from this step on)``, by increasing step.
        end_step: Optimizer step at which the run ended; not before the last row.
    """

    label: str
    units: tuple[str, ...]
    rows: tuple[tuple[int, frozenset[str]], ...]
    end_step: int


def spans(track: LedgerTrack) -> list[tuple[str, int, int]]:
    """Return ``(unit, first step, step after the last)`` for every unbroken stretch in which a unit trained.

    Rows at the same step count as the last of them. Stretches without a step are left out.

    Example:
        >>> rows = ((0, frozenset("a")), (5, frozenset("ab")), (10, frozenset("b")))
        >>> spans(LedgerTrack("LISA", ("a", "b"), rows, 12))
        [('a', 0, 10), ('b', 5, 12)]
    """
    found: list[tuple[str, int, int]] = []
    bounds = [step for step, _ in track.rows[1:]] + [track.end_step]
    for unit in track.units:
        for (step, active), end in zip(track.rows, bounds, strict=True):
            if unit not in active or end <= step:
                continue
            if found and found[-1][0] == unit and found[-1][2] == step:
                found[-1] = (unit, found[-1][1], end)
            else:
                found.append((unit, step, end))
    return found


def share_of_steps(track: LedgerTrack, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return, for each unit and each bin of steps, the share of the bin in which the unit trained.

    Args:
        track: The method's record.
        edges: Increasing optimizer steps; bin ``i`` reaches from ``edges[i]`` to ``edges[i + 1]``.

    Returns:
        Array of shape (units, bins) with values in ``[0, 1]``.
    """
    edges = np.asarray(edges, dtype=float)
    index = {unit: row for row, unit in enumerate(track.units)}
    steps_at_edges = np.zeros((len(track.units), len(edges)))
    for unit, start, stop in spans(track):
        steps_at_edges[index[unit]] += np.clip(edges, start, stop) - start
    return np.diff(steps_at_edges, axis=1) / np.diff(edges)


def ledger_figure(tracks: Sequence[LedgerTrack]) -> Figure:
    """Draw the tracks of all methods of a run in one panel.

    Args:
        tracks: One per method, each with at least one unit; the run must have made at least one optimizer step.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tracks = [track for track in tracks if track.units and track.rows and track.end_step > track.rows[0][0]]
    if not tracks:
        raise ConfigError("The ledger is empty: no method has units, or the run made no optimizer step.")
    start, end = min(track.rows[0][0] for track in tracks), max(track.end_step for track in tracks)
    edges, exact = _edges(tracks, start, end)
    shares = [share_of_steps(track, edges) for track in tracks]
    darkest = 1.0 if exact else max(share.max() for share in shares)
    num_units = sum(len(track.units) for track in tracks)
    row_height = 0.3 if num_units <= 12 else 0.19 if num_units <= _MAX_LABELS else 0.1
    figure = Figure(figsize=(11.0, min(1.9 + row_height * num_units, 22.0)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panel, totals = figure.subplots(1, 2, sharey=True, width_ratios=(8, 1))
    labels: list[str] = []
    prefix = _common_prefix([unit for track in tracks for unit in track.units])
    for number, (track, share) in enumerate(zip(tracks, shares, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        shades = LinearSegmentedColormap.from_list("share", ["#f1f3f5", colour])
        rows = np.arange(len(labels), len(labels) + len(track.units) + 1) - 0.5
        panel.pcolormesh(edges, rows, share, cmap=shades, vmin=0, vmax=darkest)
        whole = share_of_steps(track, (start, end))[:, 0]
        totals.barh(np.arange(len(labels), len(labels) + len(track.units)), 100 * whole, height=0.8, color=colour)
        if labels:
            for axis in (panel, totals):
                axis.axhline(len(labels) - 0.5, color="black", linewidth=1)
        labels += [unit.removeprefix(prefix) for unit in track.units]
    if row_height > 0.1:
        panel.hlines(np.arange(1, num_units) - 0.5, start, end, color="white", linewidth=0.8)
    every = -(-num_units // _MAX_LABELS)
    panel.set_yticks(range(0, num_units, every), labels[::every], fontsize=9 if num_units <= 40 else 7)
    panel.set_ylim(num_units - 0.5, -0.5)
    panel.set_xlim(start, end)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel(f"{prefix}*" if prefix else "unit")
    panel.xaxis.get_major_locator().set_params(integer=True)
    title = "Which layers trained when"
    if not exact:
        title += f" (shade: share of each {edges[1] - edges[0]:.0f}-step bin, darkest = {100 * darkest:.0f} %)"
    panel.set_title(title, loc="left", fontsize=11)
    totals.set_xlim(left=0)
    totals.set_xlabel("% of all steps")
    totals.tick_params(axis="y", left=False)
    for axis in (panel, totals):
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=_COLOURS[n % len(_COLOURS)], label=track.label) for n, track in enumerate(tracks)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(tracks), frameon=False, fontsize=9)
    return figure


class TrainingLedger(Callback):
    """Writes which layers trained when as a picture and as tables, when the fit ends.

    Costs nothing during training. Into the logger's folder go ``<filename>.png``, ``<filename>.csv`` (one line per
    unbroken stretch: method, unit, first step, step after the last) and ``<filename>.json`` (each method's description,
    the parameters of its units, and every draw). A run without any method is drawn from what has ``requires_grad`` at
    its start.

    Args:
        dirpath: Folder to write to. Default: the logger's folder, or the Trainer's ``default_root_dir``.
        filename: File name without its ending.

    Raises:
        ConfigError: Before training, if matplotlib is not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrainingLedger()], max_steps=1, logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    """

    def __init__(self, dirpath: str | None = None, filename: str = "training_ledger") -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._without_method: tuple[int, dict[str, tuple[str, ...]], frozenset[str]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop before any work is done if the picture could not be drawn."""
        self._without_method = None
        if stage == "fit" and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(
                "TrainingLedger draws with matplotlib, which is not installed. Install the extra with "
                '`pip install "lightning_peft[plots]"`, or remove TrainingLedger from the callbacks.'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what trains at the start, for a run without a method."""
        structure = find_structure(pl_module)
        units = {block.name: block.parameters for block in structure.blocks}
        inside = {name for names in units.values() for name in names}
        for name in structure.parameters:
            if name not in inside:
                unit = name.rpartition(".")[0] or name
                units[unit] = (*units.get(unit, ()), name)
        active = frozenset(u for u, names in units.items() if any(structure.parameters[n].requires_grad for n in names))
        self._without_method = trainer.global_step, units, active

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files and say where they lie."""
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir  # log_dir talks to all ranks
        if not trainer.is_global_zero:
            return
        order = {name: position for position, name in enumerate(find_structure(pl_module).parameters)}
        methods = find_methods(trainer)
        records = [_record(method, order) for method in methods] or self._static_records(order)
        tracks = [
            LedgerTrack(record["method"], tuple(record["units"]), record["rows"], trainer.global_step)
            for record in records
        ]
        if not any(spans(track) for track in tracks):
            show("Ledger: nothing was written, because the run made no optimizer step.")
            return
        path = Path(folder) / self.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "unit", "first_step", "end_step"])
            writer.writerows([track.label, *span] for track in tracks for span in spans(track))
        plain = [
            {**record, "rows": [[step, sorted(active)] for step, active in record["rows"]], "end_step": track.end_step}
            for record, track in zip(records, tracks, strict=True)
        ]
        path.with_suffix(".json").write_text(json.dumps(plain, indent=1, default=str) + "\n", encoding="utf-8")
        ledger_figure(tracks).savefig(path.with_suffix(".png"))
        show(f"Ledger of which layers trained when: {path.with_suffix('.png')} (and .csv, .json)")

    def _static_records(self, order: dict[str, int]) -> list[dict[str, Any]]:
        if self._without_method is None:
            return []  # training did not start
        step, units, active = self._without_method
        label = "no method" if len(active) < len(units) else "full fine-tuning"
        units = _in_model_order(units, order)
        return [{"method": label, "description": {}, "units": units, "rows": ((step, active),)}]


def _record(method: MethodCallback, order: dict[str, int]) -> dict[str, Any]:
    return {
        "method": type(method).__name__,
        "description": method.describe(),
        "units": _in_model_order(method.ledger.units, order),
        "rows": tuple(dict(method.ledger.rows()).items()),
    }


def _in_model_order(units: dict[str, tuple[str, ...]], order: dict[str, int]) -> dict[str, tuple[str, ...]]:
    last = len(order)
    return dict(sorted(units.items(), key=lambda item: min((order.get(n, last) for n in item[1]), default=last)))


def _edges(tracks: Sequence[LedgerTrack], start: int, end: int) -> tuple[np.ndarray, bool]:
    """Bin edges from ``start`` to ``end``: every draw if they fit, else equal bins of whole steps."""
    draws = {step for track in tracks for step, _ in track.rows if start < step < end}
    if len(draws) < _MAX_EXACT_DRAWS:
        return np.array([start, *sorted(draws), end], dtype=float), True
    width = -(-(end - start) // _BINS)
    edges = np.arange(start, end, width, dtype=float)
    return np.append(edges, end), False


def _common_prefix(names: Sequence[str]) -> str:
    """Return the dotted path that all ``names`` with a dot start with, up to and with a dot."""
    parts = [name.split(".")[:-1] for name in names if "." in name]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common) + "." if common and len(parts) > 1 else ""
