"""The moment when a LightningModule's model exists and nothing has been restored, wrapped or sharded yet."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule

__all__ = ["when_built"]


def when_built(module: LightningModule, action: Callable[[], object]) -> None:
    """Run ``action`` once, right after the module's next ``configure_model``; call it in ``Callback.setup``.

    Lightning runs ``configure_model`` for every stage, also where the user does not override it, if the instance has
    one. The instance has its own again before the action runs. Of several actions the first asked for runs first.
    """
    previous = module.__dict__.get("configure_model")
    original = module.configure_model

    def configure_model() -> None:
        if previous is None:
            module.__dict__.pop("configure_model", None)
        else:
            module.configure_model = previous
        original()
        action()

    module.configure_model = configure_model
