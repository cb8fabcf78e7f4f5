"""Adapters in files: ``peft``'s own format, Lightning checkpoints without the base, merged models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.adapters.config import config_from_plain, peft_methods
from lightning_peft.adapters.conversion import as_lora_over_the_original_base, changes_base
from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY, check_base, without_base
from lightning_peft.adapters.injection import Injected, activate, inject
from lightning_peft.adapters.starts import FromCheckpoint
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import BaseMismatch, ConfigError, nearest, suggest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = [
    "export_adapter",
    "is_place",
    "load_adapter_weights",
    "load_adapters",
    "load_from_checkpoint",
    "merge_adapters",
    "read_adapter_config",
]

_Module = TypeVar("_Module", bound=LightningModule)

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_REPEATABLE_INITS = ("pissa", "olora")
"""Initialisations that change the base the same way each time."""


def is_place(method: object) -> bool:
    """Whether ``method`` is a folder or a hub id and not the name of a method."""
    if not isinstance(method, (str, Path)) or str(method).lower().replace("-", "_") in peft_methods():
        return False
    return isinstance(method, Path) or "/" in method or os.sep in method or os.path.isdir(method)


def read_adapter_config(place: str) -> PeftConfig:
    """Read the configuration of a saved adapter.

    Args:
        place: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a hub id.

    Raises:
        ConfigError: If there is none, with the nearest folder that has one, or if it started in a way that cannot be
            repeated from the folder alone.
    """
    from peft import PeftConfig

    folder = Path(place)
    parts = str(place).split("/")
    local = folder.is_dir() or len(parts) != 2 or not all(parts) or folder.parent.is_dir()
    if local:
        _check_folder(folder)
    peft_methods()  # ours are known to peft from here on
    try:
        config = PeftConfig.from_pretrained(str(place))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"No adapter could be read from {str(place)!r}: {str(error).splitlines()[0]}") from error
    _check_repeatable(config, str(place))
    return config


def _check_folder(folder: Path) -> None:
    if (folder / _CONFIG_FILE).is_file():
        if not any((folder / name).is_file() for name in _WEIGHTS_FILES):
            present = sorted(path.name for path in folder.iterdir())
            raise ConfigError(
                f"{str(folder)!r} has {_CONFIG_FILE} and no {_WEIGHTS_FILES[0]}. {suggest(_WEIGHTS_FILES[0], present)}"
            )
        return
    near = folder if folder.is_dir() else folder.parent
    adapters = sorted(str(path.parent) for path in near.glob(f"*/{_CONFIG_FILE}")) if near.is_dir() else []
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        hint = (
            f"Adapters lie in {', '.join(map(repr, adapters[:4]))}."
            if adapters
            else " ".join(["It holds no such file.", *(f"Is it {name!r}?" for name in nearest(_CONFIG_FILE, names, 1))])
        )
        raise ConfigError(f"{str(folder)!r} is no saved adapter: it has no {_CONFIG_FILE}. {hint}")
    raise ConfigError(f"There is no adapter folder {str(folder)!r}. {suggest(str(folder), adapters)}".rstrip())


def _check_repeatable(config: Any, place: str) -> None:
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init == "eva":  # a start from data that leaves the base alone: the saved weights replace it
        config.init_lora_weights, config.eva_config = True, None
    elif changes_base({"init_lora_weights": init}) and init not in _REPEATABLE_INITS:
        raise ConfigError(
            f"{place!r} was saved with init_lora_weights={init!r}, which has changed the base weights in a way that "
            "the folder does not tell: on any base this adapter would compute something else. Export it again with "
            "lightning_peft (Adapter.export converts it), or save it with path_initial_model_for_weight_conversion."
        )


def load_adapter_weights(adapter: Injected, place: str) -> None:
    """Fill an adapter that has just been put in with saved values, by ``peft``'s own loading.

    Args:
        adapter: With the configuration of :func:`read_adapter_config`.
        place: The folder or hub id.

    Raises:
        BaseMismatch: If the adapter was trained on a base of another name, or its tensors do not fit the target.
        ConfigError: If the weights cannot be read.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    handle: Any = adapter.handle
    _check_base_name(adapter, place)
    try:
        weights = load_peft_weights(str(place), device="cpu")
    except (OSError, ValueError) as error:
        raise ConfigError(f"No weights could be read from {str(place)!r}: {str(error).splitlines()[0]}") from error
    expected = set(get_peft_model_state_dict(handle, adapter_name=adapter.adapter_name))
    try:
        result = set_peft_model_state_dict(handle, weights, adapter_name=adapter.adapter_name)
    except RuntimeError as error:
        raise BaseMismatch(f"The adapter in {str(place)!r} does not fit {adapter.target!r}: {error}") from error
    missing, foreign = sorted(expected - set(weights)), sorted({*result.unexpected_keys} - expected)
    if missing or foreign:
        example = f"{missing[0]} is not in it" if missing else f"{foreign[0]} has no layer here"
        raise BaseMismatch(
            f"The adapter in {str(place)!r} does not fit {adapter.target!r}: {len(missing)} tensors are missing and "
            f"{len(foreign)} have no layer ({example}). It was saved from another model, or under other options."
        )


def _check_base_name(adapter: Injected, place: str) -> None:
    handle: Any = adapter.handle
    then = adapter.asked.get("base_model_name_or_path")  # peft has replaced it by the present one
    now = getattr(handle.get_base_model(), "name_or_path", None)
    if then and now and Path(str(then)).name != Path(str(now)).name:
        raise BaseMismatch(
            f"The adapter in {str(place)!r} was trained on {then!r}, and {adapter.target!r} is {now!r}. Load that "
            f"base, or say that this is the same: config={{'base_model_name_or_path': {str(now)!r}}}."
        )


def export_adapter(adapter: Injected, folder: str | Path) -> Path:
    """Write an adapter as ``peft`` does; ``PeftModel.from_pretrained(base, folder)`` computes the same.

    A method that has changed the base when it started (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA) is written as an ordinary
    LoRA of twice the rank over the original base, equal up to rounding.

    Args:
        adapter: From :func:`~lightning_peft.adapters.injection.inject`.
        folder: Is made if it is missing.

    Returns:
        The folder that holds ``adapter_config.json``: ``folder``, or the adapter's own below it if it is not called
        ``default``.

    Raises:
        ConfigError: If the method has changed the base in a way that no LoRA can express (LoftQ, or with DoRA).
    """
    folder, name = Path(folder), adapter.adapter_name
    own = folder if name == "default" else folder / name
    if changes_base(adapter.config) is None:
        adapter.handle.save_pretrained(str(folder), selected_adapters=[name])
        return own
    state, config = as_lora_over_the_original_base(adapter.handle, name, adapter.initial_factors)
    configs: Any = adapter.handle.peft_config
    before, configs[name] = configs[name], config
    try:
        adapter.handle.save_pretrained(str(folder), selected_adapters=[name], state_dict=state)
    finally:
        configs[name] = before
    return own


def load_from_checkpoint(module_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Build a LightningModule with its adapters from a checkpoint that holds no base.

    Args:
        module_class: The user's class. Its constructor, or its ``configure_model``, gives the pretrained base.
        path: A checkpoint file of one device or DDP, or a full one of a sharding strategy.
        kwargs: For the constructor, in place of saved hyperparameters.

    Returns:
        The module in evaluation mode, adapters put in and loaded, on the CPU.

    Raises:
        ConfigError: If the checkpoint was written without :class:`~lightning_peft.Adapter`.
        BaseMismatch: If the base is not the one of the checkpoint.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        raise ConfigError(
            f"{Path(path).name} was written without lightning_peft's Adapter. "
            f"Use {module_class.__name__}.load_from_checkpoint."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keys are missing and unexpected: they are loaded below
        module = module_class.load_from_checkpoint(path, map_location="cpu", strict=False, **kwargs)
    load_adapters(module, checkpoint)
    return module.eval()


def load_adapters(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Put the adapters of a checkpoint into a module that has its pretrained base, and load what was trained.

    Args:
        module: Its model is built.
        checkpoint: Of a run with :class:`~lightning_peft.Adapter`.

    Raises:
        ConfigError: If the checkpoint was written without :class:`~lightning_peft.Adapter`.
        BaseMismatch: If the base is not the one of the checkpoint.
    """
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        raise ConfigError("The checkpoint was written without lightning_peft's Adapter: it holds no adapters.")
    for entry in saved["adapters"]:
        config = config_from_plain(entry["config"])
        names = {"target": entry["target"], "adapter_name": entry["adapter_name"]}
        start = FromCheckpoint(entry) if "start" in entry else None
        adapter = inject(module, config, **names, seed=entry["seed"], start=start)
        adapter.is_active = entry.get("active", True)
    for target in {entry["target"] for entry in saved["adapters"]}:
        activate(module, target)
    check_base(module, saved["base"])
    with without_base(module, saved["base"]):
        module.load_state_dict(checkpoint["state_dict"], strict=True)


def merge_adapters(handle: PeftModel, dequantize: bool = False) -> nn.Module:
    """Merge all active adapters into the weights of their base and take the adapter layers out, in place.

    Weights that are tied (embeddings and head) stay tied if neither was changed. Where an adapter or
    ``modules_to_save`` changed one of them, they are untied, and the model's configuration says so.

    Args:
        handle: ``peft``'s model, :attr:`lightning_peft.Adapter.handle`.
        dequantize: Turn quantised base layers into plain ones first.

    Returns:
        The base, under the names it had before; a Hugging Face model can ``save_pretrained``.

    Raises:
        ConfigError: If the method cannot be merged, if the base is quantised and ``dequantize`` is False, or if one of
            several tied embeddings was changed (encoder-decoder models), which a saved model cannot say.
    """
    base: Any = handle.get_base_model()
    if any(is_quantized(parameter) for parameter in base.parameters()):
        if not dequantize:
            raise ConfigError(
                "The base is quantised: rounding the merged weights again would lose most of what the adapter has "
                "learnt. Say dequantize=True for a merged model in floating point."
            )
        from lightning_peft.precision.layers import merge_adapter

        merge_adapter(base, dequantize=True)
        return base
    _untie(base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no longer tied after merging", UserWarning)
            warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
            merged = handle.merge_and_unload()  # type: ignore[operator]
    except (NotImplementedError, AttributeError, ValueError) as error:
        kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in handle.peft_config.values()}
        reason = str(error) or "peft has no merging for it."
        raise ConfigError(f"{', '.join(sorted(kinds))} cannot be merged into the base: {reason}") from error
    _tell_untied(merged)
    return merged


def _untie(base: nn.Module) -> None:
    """Give each adapted layer a weight of its own, so that what is merged into it changes no other.

    ``peft`` itself lets trained tokens of tied embeddings change both alike.
    """
    alike = {path for path, module in base.named_modules() if type(module).__name__ == "TrainableTokensLayer"}
    owners: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append((name, parameter))
    head: Any = getattr(base, "get_output_embeddings", lambda: None)()
    heads = tuple(f"{path}." for path, module in base.named_modules() if module is head)
    for shared in owners.values():
        changed = [name for name, _ in shared if ".base_layer." in name or ".original_module." in name]
        if len(shared) > 2 and (apart := [name for name in changed if not name.startswith(heads)]) and not alike:
            raise ConfigError(
                f"{apart[0]} is one weight with {len(shared) - 1} others, and a saved model ties them again "
                "when it is loaded: with a part of them changed it would compute something else. Keep the adapter "
                "beside the base, or leave the embeddings of an encoder-decoder out of it."
            )
        adapted = [
            name
            for name, _ in shared
            if (path := name.rpartition(".")[0]).endswith("base_layer") and path.rpartition(".")[0] not in alike
        ]
        keep_one = len(adapted) == len(shared)
        for name in adapted[keep_one:] if len(shared) > 1 else ():
            path, _, leaf = name.rpartition(".")
            weight = nn.Parameter(shared[0][1].detach().clone(), requires_grad=shared[0][1].requires_grad)
            setattr(base.get_submodule(path), leaf, weight)


def _tell_untied(model: Any) -> None:
    """Let a Hugging Face model's configuration say what is tied in it."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if not tied:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = [key for key, source in tied.items() if parameters.get(key) is not parameters.get(source)]
    if apart:
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key not in apart}
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
