"""``fit | validate | test | predict``: Lightning's command line, with the names and reports of this package."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from rich import box
from rich.table import Table

import lightning_peft
from lightning_peft.cli.diagnose import UsageError, diagnose
from lightning_peft.errors import ConfigError, LightningPeftError, suggest
from lightning_peft.methods.base import MethodCallback
from lightning_peft.report.console import show

__all__ = ["PeftCLI", "before_after_table", "guarded", "run"]

_SEED = 42


def run(args: Sequence[str], debug: bool = False) -> int:
    """Parse ``args`` and run the command they name.

    Args:
        args: Command and options, such as ``["fit", "--config", "recipe.yaml"]``.
        debug: Let errors through with their stack trace.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the configuration is wrong.
    """
    return guarded(lambda: PeftCLI(args=list(args)), args, debug)


def guarded(command: Callable[[], object], args: Sequence[str], debug: bool) -> int:
    """Run ``command``, a command line over Lightning's options, and turn mistakes into a few lines.

    Args:
        command: Parses and runs.
        args: What the user wrote, to show mistakes in.
        debug: Let errors through with their stack trace.

    Returns:
        The exit code, as of :func:`run`.
    """
    # Both are about Lightning's own calls, not the user's.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings(
        "ignore", message=r".isinstance\(treespec, LeafSpec\). is deprecated", category=FutureWarning
    )
    for name in lightning_peft._PUBLIC:
        getattr(lightning_peft, name)  # jsonargparse finds short names among the classes that are imported
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # the user's own modules, as with `python -m`
    try:
        command()
    except UsageError as error:
        if debug:
            raise
        mistakes = diagnose(error.parser, list(args), str(error))
        print("\n".join(f"error: {mistake}" for mistake in mistakes), file=sys.stderr)
        return 2
    except (LightningPeftError, MisconfigurationException) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class PeftArgumentParser(LightningArgumentParser):
    """A parser that raises :class:`UsageError` where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of exit; nested parsers keep jsonargparse's way."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(message, getattr(ex, "subcommand_parser", None) or self) from ex


class SaveConfigBesideLog(SaveConfigCallback):
    """Saves the configuration into the logger's folder; without a logger it would land in the working directory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, if there is a log."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class PeftCLI(LightningCLI):
    """Lightning's command line with ``--method``, ``--evaluate_before_after`` and a closing summary.

    Args:
        args: Command and options.
    """

    def __init__(self, args: list[str]) -> None:
        self._before: dict[str, float] | None = None
        super().__init__(
            save_config_callback=SaveConfigBesideLog,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=_SEED,
            parser_class=PeftArgumentParser,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this package's options; all commands accept them, so that one configuration serves all."""
        parser.add_argument(
            "--method",
            type=MethodCallback | None,
            default=None,
            help="Fine-tuning method of a recipe: put in front of trainer.callbacks. Given again, it is replaced "
            "(`--method HFT`), and null is full fine-tuning. Overlays in configs/methods add theirs to "
            "trainer.callbacks instead.",
        )
        parser.add_argument(
            "--evaluate_before_after",
            type=bool,
            default=False,
            help="fit only: run the test before and after training and print both results.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``, whatever ``sys.argv`` holds, and say which callbacks one file takes from another."""
        self.config = parser.parse_args(args)
        for note in _replaced_callbacks(args):
            rank_zero_only(print)(f"note: {note}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        """Build model, data and Trainer; a constructor's own error comes out of the parser's wrapping."""
        try:
            super().instantiate_classes()
        except Exception as error:
            own = _own_error(error)
            if own is None:
                raise
            raise own from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put the recipe's method in front of the other callbacks."""
        method = self._get(self.config_init, "method")
        if method is not None:
            callbacks = self._get(self.config_init, "trainer").get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            kwargs["callbacks"] = [method, *callbacks]
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            hints = []
            for option, names in (
                ("strategy", StrategyRegistry.available_strategies()),
                ("accelerator", AcceleratorRegistry.available_accelerators()),
            ):
                value = self._get(self.config_init, "trainer").get(option)
                if isinstance(value, str) and value not in {"auto", *names}:
                    hints.append(f"\n  {option}: {suggest(value, ['auto', *names])}")
            raise ConfigError(f"the Trainer refuses this: {error}{''.join(hints)}") from error

    def before_fit(self) -> None:
        """Test the model as it is, without a trace in the training that follows."""
        if self._get(self.config_init, "evaluate_before_after"):
            if not is_overridden("test_step", self.model):
                raise ConfigError(
                    f"evaluate_before_after runs the test, but {type(self.model).__name__} has no test_step. "
                    "Write one, or leave evaluate_before_after out."
                )
            self._before = self._evaluate()

    def after_fit(self) -> None:
        """Test again, and say where everything lies."""
        log_dir = self.trainer.log_dir  # talks to all ranks
        if self._before is not None and not self.trainer.interrupted:
            self._report_change(self._before, self._evaluate(), log_dir)
        self._report_files(log_dir)

    def _evaluate(self) -> dict[str, float]:
        with isolate_rng():
            results = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}

    @rank_zero_only
    def _report_change(self, before: dict[str, float], after: dict[str, float], log_dir: str | None) -> None:
        if not before:
            show(f"Nothing to compare before and after training: {type(self.model).__name__}.test_step logs no metric.")
            return
        show(before_after_table(before, after))
        values = {
            name: {"before": before[name], "after": after[name], "change": after[name] - before[name]}
            for name in before
            if name in after
        }
        path = Path(log_dir or self.trainer.default_root_dir) / "before_after.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        show(f"Test before and after: {path}")

    @rank_zero_only
    def _report_files(self, log_dir: str | None) -> None:
        if log_dir:
            show(f"Logs and configuration: {log_dir}")
        for callback in self.trainer.checkpoint_callbacks:
            path = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
            if path:
                show(f"Checkpoint: {path}")


def _replaced_callbacks(args: Sequence[str]) -> list[str]:
    """Name the configuration files whose list of callbacks replaces that of an earlier file."""
    notes: list[str] = []
    earlier = ""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, attached = option.partition("=")
        path = Path(attached if equals else value)
        if name not in ("-c", "--config") or not path.is_file():
            continue
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        trainer = content.get("trainer") if isinstance(content, dict) else None
        keys = trainer.keys() if isinstance(trainer, dict) else ()
        if "callbacks" in keys and earlier:
            notes.append(f"trainer.callbacks of {path} replaces that of {earlier}. To add to it, write 'callbacks+:'.")
        if "callbacks" in keys or "callbacks+" in keys:
            earlier = str(path)
    return notes


def _own_error(error: BaseException | None) -> BaseException | None:
    """Return the first error in the chain of causes that is meant to be read by the user."""
    while error is not None and not isinstance(error, (LightningPeftError, MisconfigurationException)):
        error = error.__cause__ or error.__context__
    return error


def before_after_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """Return a table of the metrics that both evaluations have; counts (``num_...``) are left out.

    Args:
        before: Metric name -> value before training.
        after: Metric name -> value after training.
    """
    table = Table(title="Test before and after training", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name in before:
        if name in after and not name.rpartition("/")[2].startswith("num_"):
            change = after[name] - before[name]
            table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}")
    return table
