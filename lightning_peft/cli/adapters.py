"""``lightning-peft merge`` and ``export``: what a checkpoint with adapters becomes outside of Lightning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_peft.cli.run import PeftArgumentParser, PeftCLI, guarded
from lightning_peft.errors import ConfigError

__all__ = ["export", "merge"]

_USAGE = """\
usage: lightning-peft {command} --ckpt_path FILE --output FOLDER MODEL OPTIONS

{what}
The model is given as for `fit`: --config FILE (its data and callbacks do not matter, its precision does) and
--model NAME, --model.OPTION VALUE. It gives the base; the checkpoint knows its adapters.

  --ckpt_path FILE   checkpoint of a run with Adapter; also the folder of a sharded one
  --output FOLDER    where to; must not exist, or be empty{more}

example:
  lightning-peft {command} --config configs/models/causal_lm.yaml --ckpt_path last.ckpt --output {output}"""

_MERGE = """\
Merges the adapters of a checkpoint into their base, and writes a plain Hugging Face folder, which AutoModel reads:
weights, configuration and, if the model has one, the tokenizer. Tied embeddings stay tied if neither was changed."""

_DEQUANTIZE = """
  --dequantize true  turn a quantised base into a plain one first; without, it is refused"""

_EXPORT = """\
Writes the adapters of a checkpoint as folders that peft reads (PeftModel.from_pretrained)."""


def merge(args: Sequence[str], debug: bool = False) -> int:
    """Run ``lightning-peft merge``.

    Args:
        args: Its options.
        debug: Let errors through with their stack trace.

    Returns:
        The exit code: 0 done, 1 the model or checkpoint cannot be used, 2 the command line is wrong.
    """
    return _run(_Merge, _USAGE.format(command="merge", what=_MERGE, output="merged", more=_DEQUANTIZE), args, debug)


def export(args: Sequence[str], debug: bool = False) -> int:
    """Run ``lightning-peft export``; arguments and exit code as of :func:`merge`."""
    return _run(_Export, _USAGE.format(command="export", what=_EXPORT, output="adapter", more=""), args, debug)


def _run(command: type[_FromCheckpoint], usage: str, args: Sequence[str], debug: bool) -> int:
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(usage)
        return 0 if args else 2
    return guarded(lambda: command(list(args)), args, debug)


class _FromCheckpoint(PeftCLI):
    """Reads the same options as ``fit``, builds the model alone, and fills it from a checkpoint."""

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
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint of a run with Adapter.")
        parser.add_argument("--output", type=str | None, default=None, help="Folder to write.")

    def instantiate_classes(self) -> None:
        """Build the model and nothing else, load the checkpoint, and write."""
        from lightning_peft.adapters.files import load_adapters

        path, output = (self._get(self.config, name) for name in ("ckpt_path", "output"))
        for option, value in (("--ckpt_path", path), ("--output", output)):
            if value is None:
                raise ConfigError(f"{option} is missing: see `lightning-peft merge --help`.")
        if Path(output).exists() and (Path(output).is_file() or any(Path(output).iterdir())):
            raise ConfigError(f"{output!r} exists already and is not empty. Give another --output.")
        checkpoint = _read(Path(path))
        config: Any = self.config.clone()
        for key in ("data", "method", "optimizer", "lr_scheduler"):
            config.pop(key, None)
        for key in ("callbacks", "logger", "profiler", "strategy"):
            config.trainer[key] = None
        made: Any = self.parser.instantiate_classes(config)
        module = cast(LightningModule, made["model"])
        module.configure_model()
        _convert(module, made["trainer"])
        load_adapters(module, checkpoint)
        self.write(module.eval(), Path(output))

    def write(self, module: LightningModule, output: Path) -> None:
        """Write what the command is for."""
        raise NotImplementedError


class _Merge(_FromCheckpoint):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what merging asks."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--dequantize", type=bool, default=False, help="Make a quantised base plain first.")

    def write(self, module: LightningModule, output: Path) -> None:
        """Write a folder per target; a single one is the output itself."""
        from lightning_peft.adapters.files import merge_adapters
        from lightning_peft.adapters.injection import injected

        handles = {target: adapter.handle for (target, _), adapter in injected(module).items()}
        for target, handle in handles.items():
            model: Any = merge_adapters(handle, dequantize=self._get(self.config, "dequantize"))
            if not hasattr(model, "save_pretrained"):
                raise ConfigError(
                    f"{target!r} is a {type(model).__name__} and no Hugging Face model: merge it in Python by "
                    "lightning_peft.merge_adapters, and save it as you do."
                )
            folder = output if len(handles) == 1 else output / target
            model.save_pretrained(str(folder))
            _save_tokenizer(module, folder)
            print(f"Merged model: {folder}", file=sys.stderr)


class _Export(_FromCheckpoint):
    def write(self, module: LightningModule, output: Path) -> None:
        """Write a folder per adapter; an adapter called ``default`` is in the output itself."""
        from lightning_peft.adapters.files import export_adapter
        from lightning_peft.adapters.injection import injected

        adapters = injected(module)
        targets = {target for target, _ in adapters}
        for (target, _), adapter in adapters.items():
            folder = export_adapter(adapter, output if len(targets) == 1 else output / target)
            print(f"Adapter: {folder}", file=sys.stderr)


def _convert(module: LightningModule, trainer: Any) -> None:
    """Bring a base into the precision that it had in the run."""
    plugins = trainer.get("plugins") or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if hasattr(plugin, "prepare"):
            plugin.prepare(module)
    if (dtype := {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(trainer.get("precision"))) is not None:
        module.to(dtype)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        from lightning_peft.strategies.consolidate import consolidate_checkpoint

        return consolidate_checkpoint(path)
    if not path.is_file():
        from lightning_peft.errors import suggest

        near = sorted(str(other) for other in path.parent.glob("*")) if path.parent.is_dir() else []
        raise ConfigError(f"There is no checkpoint {str(path)!r}. {suggest(str(path), near)}".rstrip())
    return torch.load(path, map_location="cpu", weights_only=True)


def _save_tokenizer(module: Any, folder: Path) -> None:
    from lightning_peft.models.base import PretrainedModule

    if not isinstance(module, PretrainedModule):
        return
    try:
        tokenizer = module.tokenizer
    except ConfigError as error:
        print(f"note: no tokenizer is written. {error}", file=sys.stderr)
        return
    tokenizer.save_pretrained(str(folder))
