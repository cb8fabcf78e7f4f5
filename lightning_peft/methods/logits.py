"""The class scores that a user's module computes on the way to its loss, wherever it keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from lightning_peft.core.blocks import Structure
from lightning_peft.errors import ConfigError
from lightning_peft.methods.scoring import scoring_loss

__all__ = ["batch_logits"]


def batch_logits(trainer: Trainer, pl_module: LightningModule, structure: Structure, batch: Any) -> Tensor:
    """Return the logits of one batch, under the Trainer's precision, in single precision.

    If the module has a method ``batch_logits(batch)``, that is asked. Otherwise its ``training_step`` runs, and the
    logits are the ``logits`` of the last output in it that has some (a Hugging Face model's), or what the model's head
    returned. Call it inside :func:`~lightning_peft.methods.scoring.without_trace`.

    Shapes:
        ``(..., classes)``.

    Raises:
        ConfigError: If there are none, or they are no distribution over two or more classes.
    """
    own = getattr(pl_module, "batch_logits", None)
    if own is not None:
        with trainer.precision_plugin.train_step_context():
            logits = own(batch)
    else:
        with _listening(structure) as heard:
            scoring_loss(trainer, pl_module, batch)
        logits = heard()
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[-1] < 2 or not logits.is_floating_point():
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"Importance needs logits over two or more classes from training_step, and found {what}. Give your "
            "LightningModule a method batch_logits(batch) that returns them."
        )
    return logits.float()


@contextmanager
def _listening(structure: Structure) -> Iterator[Callable[[], Any]]:
    owners = {alias.rpartition(".")[0] for alias, name in structure.aliases.items() if name in structure.roles["head"]}
    heads = {id(structure.modules[path]) for path in owners if path in structure.modules}
    heard: dict[str, Any] = {}

    def hook(module: Any, _: Any, output: Any) -> None:
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(found, Tensor):
            heard["output"] = found
        elif id(module) in heads and isinstance(output, Tensor):
            heard["head"] = output

    handle = register_module_forward_hook(hook)
    try:
        yield lambda: heard.get("output", heard.get("head"))
    finally:
        handle.remove()
