"""``lightning-peft schedule``: write a schedule for FinetuningSchedule to edit, without training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_peft.cli.run import PeftArgumentParser, PeftCLI, guarded
from lightning_peft.errors import ConfigError
from lightning_peft.methods.phase_draft import DraftForm, draft_schedule

__all__ = ["write_schedule"]

_USAGE = """\
usage: lightning-peft schedule --generate [--form {blocks,pairs}] [--output FILE] MODEL OPTIONS

Writes a schedule for FinetuningSchedule, to edit, without training. The model is given as for `fit`: --config FILE
(its data, trainer and method parts do not matter) and --model NAME, --model.OPTION VALUE.

  --generate              write the schedule of this model
  --form {blocks,pairs}   blocks (default): head, then block by block, then the embeddings;
                          pairs: two tensors a phase, from the last to the first
  --output FILE           where to (default: standard output); an existing file is not overwritten

example:
  lightning-peft schedule --generate --config configs/models/causal_lm.yaml --output schedule.yaml"""


def write_schedule(args: Sequence[str], debug: bool = False) -> int:
    """Run ``lightning-peft schedule``.

    Args:
        args: Its options.
        debug: Let errors through with their stack trace.

    Returns:
        The exit code: 0 done, 1 the model cannot be built, 2 the command line is wrong.
    """
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(_USAGE)
        return 0 if args else 2
    return guarded(lambda: _Draft(list(args)), args, debug)


class _Draft(PeftCLI):
    """Reads the same options as ``fit``, builds the model alone, and writes its schedule."""

    def __init__(self, args: list[str]) -> None:
        self._before = None
        LightningCLI.__init__(
            self,
            save_config_callback=None,
            seed_everything_default=False,
            parser_class=PeftArgumentParser,
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add this command's own options."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--generate", action="store_true", help="Write the schedule of this model.")
        parser.add_argument("--form", type=DraftForm, default="blocks", help="blocks or pairs of tensors per phase.")
        parser.add_argument("--output", type=str | None, default=None, help="File to write. Default: standard output.")

    def instantiate_classes(self) -> None:
        """Build the model and nothing else, and write."""
        if not self._get(self.config, "generate"):
            raise ConfigError("`lightning-peft schedule` needs --generate, which writes the schedule of the model.")
        output = self._get(self.config, "output")
        if output is not None and Path(output).exists():
            raise ConfigError(f"{output!r} exists already. Give another --output, so that nothing edited is lost.")
        config: Any = self.config.clone()
        for key in ("trainer", "data", "method", "optimizer", "lr_scheduler"):
            config.pop(key, None)
        model = cast(LightningModule, self.parser.instantiate_classes(config)["model"])
        model.configure_model()
        text = draft_schedule(model, self._get(self.config, "form"))
        if output is None:
            print(text, end="")
            return
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
        print(f"Schedule: {output}", file=sys.stderr)
