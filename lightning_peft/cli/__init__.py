"""The command line ``lightning-peft``.

``fit | validate | test | predict`` are Lightning's own command line over any LightningModule and LightningDataModule,
with this package's names known to it (:mod:`lightning_peft.cli.run`); ``methods`` lists the methods
(:mod:`lightning_peft.cli.methods`), ``schedule`` writes a schedule (:mod:`lightning_peft.cli.schedule`), and ``merge``
and ``export`` take adapters out of a checkpoint (:mod:`lightning_peft.cli.adapters`). This module decides which of them
runs and turns mistakes into a few lines (:mod:`lightning_peft.cli.diagnose`). It imports nothing heavy, so that help
and a mistyped command answer at once.

Exit codes: 0 done, 1 the run failed, 2 the command line or a configuration file is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_peft.errors import LightningPeftError, suggest

__all__ = ["main"]

_RUN_COMMANDS = {
    "fit": "train, and validate on the way",
    "validate": "run one validation epoch",
    "test": "run one test epoch",
    "predict": "run one prediction epoch",
}
_COMMANDS = {
    **_RUN_COMMANDS,
    "merge": "merge the adapters of a checkpoint into a plain Hugging Face folder",
    "export": "write the adapters of a checkpoint as peft reads them",
    "schedule": "write a fine-tuning schedule of a model, to edit",
    "methods": "list the fine-tuning methods; `methods NAME` shows one whole",
}

_HELP = """\
usage: lightning-peft COMMAND [options]

Fine-tune part of a model, exactly, with PyTorch Lightning.

commands:
{commands}

examples:
  lightning-peft fit --config configs/recipes/quickstart.yaml
  lightning-peft fit --config configs/recipes/quickstart.yaml --method HFT --method.fraction 0.5
  lightning-peft fit --config configs/models/causal_lm.yaml --config configs/data/text_files.yaml \\
      --config configs/methods/lisa.yaml --trainer.max_steps 100
  lightning-peft methods LISA

`lightning-peft COMMAND --help` shows the options of a command, `--print_config` the whole configuration it would run.
`--debug` (or LIGHTNING_PEFT_DEBUG=1) shows the stack trace of an error."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``lightning-peft``.

    Args:
        args: The command and its options. Default: ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the command line or a configuration file is wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = os.environ.get("LIGHTNING_PEFT_DEBUG", "0") not in ("", "0") or "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<9} {text}" for name, text in _COMMANDS.items())))
        return 0 if args else 2
    if args[0] == "--version":
        from lightning_peft import __version__

        print(f"lightning_peft {__version__}")
        return 0
    command = args[0]
    if command not in _COMMANDS:
        return _wrong_command(args)
    try:
        if command == "methods":
            from lightning_peft.cli.methods import print_methods

            return print_methods(args[1:])
        if command == "schedule":
            from lightning_peft.cli.schedule import write_schedule

            return write_schedule(args[1:], debug=debug)
        if command in ("merge", "export"):
            from lightning_peft.cli import adapters

            return getattr(adapters, command)(args[1:], debug=debug)
        from lightning_peft.cli.run import run

        return run(args, debug=debug)
    except LightningPeftError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _wrong_command(args: list[str]) -> int:
    """Say which command was meant."""
    command = next((arg for arg in args if arg in _COMMANDS), None)
    if args[0].startswith("-") and command is not None:
        message = f"{args[0]!r} comes before the command.\n  Options follow it: lightning-peft {command} {args[0]} ..."
    else:
        message = f"{args[0]!r} is not a command of lightning-peft.\n  {suggest(args[0], _COMMANDS)}"
    print(f"error: {message}", file=sys.stderr)
    return 2
