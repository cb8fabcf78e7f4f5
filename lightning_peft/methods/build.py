"""The moment when a LightningModule's model exists and nothing has been restored, wrapped or sharded yet."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule

from lightning_peft.core.instance import replace_on

__all__ = ["when_built"]


def when_built(module: LightningModule, action: Callable[[], object]) -> None:
    """Run ``action`` once, right after the module's next ``configure_model``; call it in ``Callback.setup``.

    Lightning runs ``configure_model`` for every stage, also where the user does not override it, if the instance has
    one. The instance has its own again before the action runs. Of several actions the first asked for runs first.
    """
    original = module.configure_model

    def configure_model() -> None:
        undo()
        original()
        action()

    undo = replace_on(module, configure_model=configure_model)
