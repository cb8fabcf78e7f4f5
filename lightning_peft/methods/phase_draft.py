"""Write a schedule to edit: a commented YAML file for a model, from the head down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.names import named_parameters
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.layers.gradual_unfreezing import layer_groups
from lightning_peft.methods.phase_names import resolve_entry

__all__ = ["DraftForm", "draft_schedule"]

DraftForm = Literal["blocks", "pairs"]
"""``blocks``: head, then one block after the other, then the embeddings. ``pairs``: two tensors a phase, last first."""

_HEADER = """\
# Fine-tuning schedule of {title}: {phases} phases, {numel:,} parameters.
#
#   FinetuningSchedule("this-file.yaml")      or      --method FinetuningSchedule --method.schedule this-file.yaml
#
# Edit it: join phases, leave parameters out (they stay frozen), change the order. Phases are numbered 0, 1, 2, ...
# What a phase may say, beside `params` (a list of names, globs, re:..., class:..., or the roles blocks, embeddings,
# head, norms, biases, all; it thaws these beside what trained before):
#
#   freeze: [...]               of what trains, what freezes again
#   only: [...]                 exactly what trains, in place of params and freeze
#   max_transition_epoch: 1     the next phase begins with this epoch, counted from 0
#   max_steps: 500              ... or after so many optimizer steps of this phase
#   monitor: val_loss           ... or when this logged metric has not improved, {patience} looks in a row
#   patience: 3                     (the default of a phase that says nothing of its end: val_loss, 3 looks)
#   min_delta: 0.0
#   mode: min
#   lr: 1.0e-5                  learning rate of what the phase thaws (the default is base_max_lr, 1.0e-5)
#   optimizer_options: {{weight_decay: 0.0}}
#   new_lr_scheduler: {{lr_scheduler_init: {{class_path: torch.optim.lr_scheduler.StepLR, init_args: {{...}}}}}}
#   new_optimizer: {{optimizer_init: {{class_path: torch.optim.SGD, init_args: {{...}}}}}}
"""


def draft_schedule(root: nn.Module, form: DraftForm = "blocks", title: str | None = None) -> str:
    """Return YAML text of a schedule that thaws the whole model from the head down.

    Args:
        root: The LightningModule (names in a schedule start there), built. If it names a ``main_metric``, as this
            package's models do, the phases wait for a plateau of its validation value.
        form: ``"blocks"``: one block per phase; ``"pairs"``: two tensors per phase, in reverse order of registration,
            the implicit schedule of finetuning-scheduler, whose format this is.
        title: What the first line calls the model. Default: the class.

    Raises:
        ConfigError: If ``form`` is unknown or the model has no parameters that could train.
    """
    if form not in get_args(DraftForm):
        raise ConfigError(f"form={form!r} is not a form of schedule. {suggest(str(form), get_args(DraftForm))}")
    parameters = named_parameters(root)
    names = [name for name, p in parameters.items() if p.is_floating_point() or p.is_complex()]
    if not names:
        raise ConfigError(
            f"{type(root).__name__} has no parameters (yet). A model that is built later than __init__ (in "
            "configure_model or setup) needs its data first."
        )
    structure = find_structure(root)
    phases: list[tuple[str, list[str], list[str]]] = []
    if form == "pairs":
        backwards = names[::-1]
        for start in range(0, len(backwards), 2):
            pair = backwards[start : start + 2]
            phases.append(("", pair, pair))
    else:
        for label, members in reversed(layer_groups(structure, names).items()):
            phases.append((label, list(members), _entries(label, members, structure)))
    lines = [
        _HEADER.format(
            title=title or type(root).__name__,
            phases=len(phases),
            numel=sum(parameters[name].numel() for name in names),
            patience="`patience`",
        )
    ]
    metric = getattr(root, "main_metric", None)
    for number, (label, members, entries) in enumerate(phases):
        count = f"{len(members)} tensor{'s' if len(members) != 1 else ''}"
        comment = f"{label}: {count}" if label else count
        lines.append(f"{number}: # {comment}, {sum(parameters[name].numel() for name in members):,} parameters")
        lines.append("  params:")
        lines += [f"  - {_quoted(entry)}" for entry in entries]
        if isinstance(metric, str) and number < len(phases) - 1:
            lines.append(f"  monitor: val/{metric} # val/NAME/{metric} if the data name their validation sets")
            lines += [] if "loss" in metric else ["  mode: max"]
    return "\n".join(lines) + "\n"


def _entries(label: str, members: Sequence[str], structure: Structure) -> list[str]:
    """The shortest list of entries that means exactly ``members``: one for a whole block, else the names."""
    for entry in (f"{label}.*", f"re:{re.escape(label)}\\..*"):
        try:
            if set(resolve_entry(entry, structure)[0]) == set(members):
                return [entry]
        except ScopeError:
            continue
    return list(members)


def _quoted(entry: str) -> str:
    return f"'{entry}'" if re.match(r"[^\w]|re:", entry) else entry
