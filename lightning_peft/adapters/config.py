"""Make, check and store the configuration of a ``peft`` method."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, suggest

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["config_from_plain", "make_config", "peft_methods", "plain_config"]


@functools.cache
def peft_methods() -> dict[str, type[PeftConfig]]:
    """Return every method of the installed ``peft`` and of this package: lower-case name -> config class."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import lightning_peft.adapters.native  # noqa: F401  (registers ours)

    return {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def make_config(method: str | PeftConfig, options: Mapping[str, Any] | None = None) -> PeftConfig:
    """Return the configuration object of a method.

    Args:
        method: Name of a ``peft`` method, in any case, with ``-`` or ``_``; or a ``PeftConfig``, which is copied.
        options: Fields of the method's config class.

    Raises:
        ConfigError: If the method or an option is unknown, with the nearest, or if ``peft`` refuses the values.
    """
    from peft import PeftConfig

    options = dict(options or {})
    if isinstance(method, PeftConfig):
        made = copy.deepcopy(method)
        unknown = [name for name in options if not hasattr(made, name)]
        if options and not unknown:
            made = dataclasses.replace(made, **options)
        kind = type(made)
    else:
        methods = peft_methods()
        kind = methods.get(str(method).lower().replace("-", "_"))
        if kind is None:
            raise ConfigError(f"peft has no method {method!r}. {suggest(str(method).lower(), sorted(methods))}")
        fields = [field.name for field in dataclasses.fields(kind) if field.init]
        unknown = [name for name in options if name not in fields]
        made = None
    if unknown:
        fields = [field.name for field in dataclasses.fields(kind) if field.init]
        raise ConfigError(
            f"{kind.__name__} has no option {unknown[0]!r}. {suggest(unknown[0], fields)}"
            + (f" (also unknown: {', '.join(map(repr, unknown[1:]))})" if unknown[1:] else "")
        )
    if made is None:
        try:
            made = kind(**copy.deepcopy(options))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{kind.__name__}: {error}") from error
    made.inference_mode = False  # a config read from a folder says True, and nothing would train
    return made


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """Return a configuration as plain values that JSON and ``torch.load(weights_only=True)`` take."""
    return json.loads(json.dumps(config.to_dict(), default=_plain))


def config_from_plain(values: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration that :func:`plain_config` took apart.

    Raises:
        ConfigError: If the installed ``peft`` lacks its method or one of its options.
    """
    fields = {field.name for field in dataclasses.fields(_class_of(values)) if field.init}
    return make_config(str(values["peft_type"]), {name: value for name, value in values.items() if name in fields})


def _class_of(values: Mapping[str, Any]) -> type[PeftConfig]:
    name = str(values.get("peft_type", "")).lower()
    methods = peft_methods()
    if name not in methods:
        raise ConfigError(f"The installed peft has no method {name!r}. {suggest(name, sorted(methods))}")
    return methods[name]


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "value"):
        return value.value
    return str(value)
