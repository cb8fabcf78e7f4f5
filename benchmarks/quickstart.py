"""The quickstart recipe with full fine-tuning, HFT and LISA: what each learns, keeps and costs.

Each method runs `configs/recipes/quickstart.yaml` through the command line's own code from the same weights, seed and
order of batches, and is tested before and after. Step times are then measured apart from that, in lock-step, because
three runs after one another cannot be compared on a shared machine.

    python -m benchmarks.quickstart
    python -m benchmarks.quickstart --rounds 2 --tiny --output try.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import lightning_peft
from benchmarks.harness import (
    ExactCost,
    Gate,
    StepCounter,
    environment,
    lock_step,
    mib,
    optimizer_bytes,
    paired_ratio,
    quiet_lightning,
    share_one_heap,
    write_json,
)
from lightning_peft.cli.run import PeftCLI
from lightning_peft.report.methods import find_methods

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results"
SKILLS = {"code_search": "taught", "identifiers": "not to be lost"}
WARMUP = 2


@dataclass(frozen=True)
class Method:
    """A method as the command line is told of it.

    Args:
        options: What is added to the recipe's command.
        learning_rate: Peak rate; each method has its own, as each moves another number of weights.
    """

    options: tuple[str, ...]
    learning_rate: float

    def arguments(self) -> list[str]:
        """Return the options of the command line."""
        return [*self.options, "--model.optimizer.init_args.lr", str(self.learning_rate)]


METHODS = {
    "full": Method(("--method", "null"), 2e-4),
    "HFT": Method(("--method", "HFT", "--method.fraction", "0.5"), 2e-4),
    "LISA": Method((), 4e-4),  # the recipe's own method
}


class RecipeCLI(PeftCLI):
    """The command line with further callbacks at the end of the Trainer's.

    Args:
        args: Command and options.
        extra: The callbacks.
    """

    def __init__(self, args: list[str], extra: Sequence[Callback]) -> None:
        self._extra = extra
        super().__init__(args=args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks, after all others."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.extend(self._extra)  # pyright: ignore[reportAttributeAccessIssue]
        return trainer


def run_recipe(arguments: Sequence[str], extra: Sequence[Callback], folder: str) -> RecipeCLI:
    """Run the recipe, as ``lightning-peft fit --config configs/recipes/quickstart.yaml`` with ``arguments`` does.

    Args:
        arguments: Further options of the command line.
        extra: Callbacks that come after the Trainer's own.
        folder: Where the Trainer writes.
    """
    for name in lightning_peft.__all__:
        getattr(lightning_peft, name)  # short class names resolve among what is imported
    command = ["fit", "--config", str(RECIPE), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return RecipeCLI([*command, "--trainer.default_root_dir", folder, *arguments], extra)


class Totals(Callback):
    """Note at the end of training what trains, what could, and what the optimizer holds; and how long it took."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take notes, before the methods give the model back."""
        self.fit_seconds = time.perf_counter() - self._start
        self.steps = trainer.global_step
        parameters = dict(pl_module.named_parameters())
        methods = find_methods(trainer)
        can = {name for each in methods for name in (each.trainable_names if each.is_static else each.selectable)}
        now = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self.sizes = {
            f"{key}_{unit}": sum(size(parameters[name]) for name in names)
            for key, names in (("all", set(parameters)), ("can_train", can | now), ("train_now", now))
            for unit, size in (("parameters", lambda p: p.numel()), ("bytes", lambda p: p.nbytes))
        }
        self.optimizer_bytes = optimizer_bytes(trainer.optimizers)
        self.draws = [len(each.history) for each in methods]


BARE = (
    *("--trainer.callbacks", "null", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
    *("--evaluate_before_after", "false"),
)
"""Options that leave the training alone and everything else out."""


def learn(method: Method, tiny: bool) -> dict[str, Any]:
    """Run the recipe and return the test before and after, and the sizes at the end."""
    totals = Totals()
    short = ["--trainer.max_steps", "3", "--data.num_test", "40"] if tiny else []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--trainer.logger.init_args.save_dir", folder]
        cli = run_recipe([*method.arguments(), *options, *short], [totals], folder)
        (report,) = Path(folder).rglob("before_after.json")
        tests = json.loads(report.read_text(encoding="utf-8"))
        settings = [each.settings() for each in find_methods(cli.trainer)]
    return {
        "settings": settings,
        "learning_rate": method.learning_rate,
        "steps": totals.steps,
        "draws": totals.draws,
        "test": tests,
        "mrr": {skill: {when: tests[f"test/{skill}/mrr"][when] for when in ("before", "after")} for skill in SKILLS},
        "fit_seconds": totals.fit_seconds,
        "sizes": totals.sizes,
        "optimizer_bytes_at_end": totals.optimizer_bytes,
    }


def count(method: Method, num_steps: int) -> dict[str, float]:
    """Return operations and bytes per step: the mean over the first steps, which all methods make on equal batches."""
    counter = StepCounter()
    with tempfile.TemporaryDirectory() as folder:
        run_recipe([*method.arguments(), *BARE, "--trainer.max_steps", str(num_steps)], [counter], folder)
    return {
        key: statistics.fmean(getattr(step, key) for step in counter.steps) for key in ExactCost.__dataclass_fields__
    }


def time_steps(rounds: int) -> dict[str, Any]:
    """Return each method's step time as a ratio to full fine-tuning, from lock-step runs of the recipe."""
    arguments = [*BARE, "--trainer.max_steps", str(WARMUP + rounds)]
    fits = {**METHODS, "full again": METHODS["full"]}

    def fit(method: Method, gate: Gate) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_recipe([*method.arguments(), *arguments], [gate], folder)

    turns = lock_step(
        {name: lambda gate, method=method: fit(method, gate) for name, method in fits.items()},
        rounds=rounds,
        warmup=WARMUP,
    )
    seconds = {
        clock: {name: [getattr(turn, clock) for turn in each] for name, each in turns.items()}
        for clock in ("cpu_seconds", "wall_seconds")
    }
    return {
        name: {
            clock: {
                "median_seconds": statistics.median(by_name[name]),
                "all_steps": paired_ratio(by_name[name], by_name["full"]),
            }
            for clock, by_name in seconds.items()
        }
        for name in fits
    }


def cells(name: str, result: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    method, counts = result["methods"][name], result["counts"][name]
    time_ratio = result["times"][name]["cpu_seconds"]["all_steps"].median
    sizes = method["sizes"]
    mrr = [f"{value['before']:.3f} → {value['after']:.3f}" for value in method["mrr"].values()]
    return [
        name,
        f"{method['learning_rate']:g}",
        *mrr,
        f"{time_ratio:.3f}",
        f"{counts['flops'] / result['counts']['full']['flops']:.3f}",
        *(f"{sizes[f'{key}_parameters'] / 1e6:.2f} M / {mib(sizes[f'{key}_bytes'])}" for key in WEIGHTS),
        mib(counts["activation_bytes"]),
        mib(counts["gradient_bytes"]),
        mib(method["optimizer_bytes_at_end"]),
    ]


WEIGHTS = ("train_now", "can_train")
HEADINGS = (
    "method",
    "lr",
    *(f"{skill} MRR ({role})" for skill, role in SKILLS.items()),
    "step time / full",
    "FLOPs / full",
    "trains now: parameters / MiB",
    "can train: parameters / MiB",
    "activations MiB",
    "gradients MiB",
    "optimizer MiB at the end",
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table as a Markdown page that says where it comes from."""
    rows = [cells(name, result) for name in METHODS]
    control = result["times"]["full again"]["cpu_seconds"]["all_steps"].median
    versions = f"Python {result['python']}, torch {result['versions']['torch']}"
    lines = [
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"`{result['command']}`, {result['date'][:10]}, {versions}, {result['machine']['processor']}.",
        f"{result['methods']['full']['steps']} steps from the same weights, seed and batches, one seed. MRR among "
        f"{result['test_candidates']} candidates, before → after; with 500 its standard error is about 0.02, and "
        "smaller differences between methods say nothing. Step time: median of "
        f"{result['rounds']} paired ratios of CPU time, one thread, in lock-step (a second full fine-tuning: "
        f"{control:.3f}).",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the result files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=24, help="measured rounds of one step per method, in lock-step")
    parser.add_argument("--tiny", action="store_true", help="three steps, small tests: tries the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "quickstart.json", help="result file; .md goes beside")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    quiet_lightning()
    result: dict[str, Any] = {
        "what": "the quickstart recipe with full fine-tuning, HFT and LISA",
        **environment("quickstart", arguments),
        "threads_in_fits": torch.get_num_threads(),
        "recipe": RECIPE.relative_to(ROOT).as_posix(),
        "threads_in_lock_step": 1,
        "one_heap_for_all_threads": share_one_heap(),
        "rounds": options.rounds,
        "warmup_rounds": WARMUP,
        "tiny": options.tiny,
    }
    result["methods"] = {name: learn(method, options.tiny) for name, method in METHODS.items()}
    check_same_start(result["methods"])
    result["test_candidates"] = int(result["methods"]["full"]["test"]["test/code_search/num_candidates"]["before"])
    result["counts"] = {name: count(method, 2) for name, method in METHODS.items()}
    result["times"] = time_steps(options.rounds)
    table = Table(*HEADINGS, title="Quickstart")
    for name in METHODS:
        table.add_row(*cells(name, result))
    Console(width=None if sys.stdout.isatty() else 190).print(table)
    write_json(options.output, result)
    options.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(f"written: {options.output} and {options.output.with_suffix('.md').name}")
    return 0


def check_same_start(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all methods were tested with the same result before training.

    Raises:
        RuntimeError: If they were not, so that their results cannot be compared.
    """
    starts = {name: {key: value["before"] for key, value in each["test"].items()} for name, each in methods.items()}
    if any(start != starts["full"] for start in starts.values()):
        raise RuntimeError(f"The methods did not start from the same model and test: {starts}")


if __name__ == "__main__":
    raise SystemExit(main())
