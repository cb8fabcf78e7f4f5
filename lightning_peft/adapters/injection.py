"""Put adapters into the model of a LightningModule, once.

``peft.get_peft_model`` changes the layers of the target in place; the object that it returns is kept beside the
module tree, so that the user's module goes on calling its own model, under its own parameter names. Prompt methods
work by another ``forward`` and do take the model's place.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.config import plain_config
from lightning_peft.adapters.conversion import initial_factors, weights_before
from lightning_peft.adapters.limits import check_adapted, check_complete, check_quantised
from lightning_peft.adapters.places import module_paths
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.names import named_parameters
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.scope import match_names
from lightning_peft.errors import ConfigError, LightningPeftError, ScopeError, suggest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from lightning_peft.adapters.starts import Start

__all__ = ["Injected", "activate", "asked_for", "inject", "injected", "layer_paths"]

_MARK = "_lightning_peft_adapters"
_IN_PLACE_OF_THE_MODEL = ("ADAPTION_PROMPT", "SHADOW", "XLORA")
_DATA_DRIVEN = {"eva": "EVA", "corda": "CorDA", "lora_ga": "LoRA-GA"}


@dataclass
class Injected:
    """One adapter of a model.

    Args:
        target: Path of the submodule it was put into.
        adapter_name: As ``peft`` calls it.
        asked: The configuration that was asked for, as plain values.
        seed: Of the initial values.
        handle: ``peft``'s model over the target.
        names: Clean names, from the LightningModule, of the parameters that the adapter trains.
        initial_factors: Of a start that was subtracted from the base (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA): path of the
            layer, below the target, -> A and B as they were, on the CPU; the base is ``W - scaling B A``.
        base_marks: Clean names of the parameters that were changed so, with a fingerprint of what they were and of
            the factors.
        from_data: Whether it started from data, so that a checkpoint has to say how.
    """

    target: str
    adapter_name: str
    asked: dict[str, Any]
    seed: int
    handle: PeftModel = field(repr=False)
    names: frozenset[str] = field(repr=False, default=frozenset())
    initial_factors: dict[str, tuple[Tensor, Tensor]] = field(repr=False, default_factory=dict)
    base_marks: dict[str, int] = field(repr=False, default_factory=dict)
    from_data: bool = False
    is_active: bool = True
    """Whether it takes part in the forward pass; :func:`activate` brings it into force."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it came out of the injection (ranks, targets), as plain values."""
        return plain_config(self.handle.peft_config[self.adapter_name])

    def record(self) -> dict[str, Any]:
        """What a checkpoint notes, as plain values and tensors: enough to put the adapter in again."""
        entry = {
            "target": self.target,
            "adapter_name": self.adapter_name,
            "config": self.config,
            "seed": self.seed,
            "active": self.is_active,
        }
        if self.from_data:
            factors = {path: list(pair) for path, pair in self.initial_factors.items()}
            entry["start"] = {"asked": self.asked, "factors": factors}
        return entry

    def is_in(self, root: nn.Module) -> bool:
        """Whether ``root`` still has the model that the adapter was put into."""
        try:
            present = root.get_submodule(self.target)
        except AttributeError:
            return False
        return present is self.handle or present is self.handle.get_base_model()


def asked_for(config: PeftConfig, layers: str | Sequence[str] | None) -> dict[str, Any]:
    """Return the settings of an adapter as plain values, before anything has been made of them."""
    return {**plain_config(config), "layers": layers if layers is None or isinstance(layers, str) else list(layers)}


def injected(root: nn.Module) -> dict[tuple[str, str], Injected]:
    """Return the adapters that :func:`inject` has put into ``root``: (target, adapter name) -> adapter."""
    found: dict[tuple[str, str], Injected] = root.__dict__.get(_MARK, {})
    return {key: adapter for key, adapter in found.items() if adapter.is_in(root)}


def inject(
    root: nn.Module,
    config: PeftConfig,
    *,
    target: str = "model",
    adapter_name: str = "default",
    layers: str | Sequence[str] | None = None,
    seed: int = 0,
    start: Start | None = None,
) -> Injected:
    """Put an adapter into ``root.<target>``; if it is there already, return it.

    Everything below the target but the adapters of this call and of earlier ones, and ``modules_to_save``, is frozen.
    The global random state is not used.

    Args:
        root: The LightningModule.
        config: The method; it is copied.
        target: Path of the submodule.
        adapter_name: Name of the adapter; several of one kind may be put into one target, and all are active.
        layers: Which layers get an adapter, as a scope of ``root``. None leaves it to ``config.target_modules``, or
            to what ``peft`` knows of the architecture.
        seed: Of the initial values; the same on all ranks.
        start: Where a start from data comes from, for EVA, CorDA, LoRA-GA and LoRA-SB.

    Raises:
        ConfigError: If there is another adapter of this name, or ``peft`` refuses, with its reason.
        ScopeError: If ``target`` or ``layers`` names nothing.
    """
    asked = asked_for(config, layers)
    present = injected(root)
    found = present.get((target, adapter_name))
    if found is not None:
        if found.asked != asked:
            changed = sorted(k for k in {*asked, *found.asked} if asked.get(k) != found.asked.get(k))
            raise ConfigError(
                f"{target!r} has an adapter {adapter_name!r} of other settings ({', '.join(changed)}). Give this one "
                "another adapter_name, or build the model anew."
            )
        return found
    from lightning_peft.adapters.master_weights import compute_in_input_dtype

    base = _submodule(root, target)
    config = copy.deepcopy(config)
    siblings = [adapter for (path, _), adapter in present.items() if path == target]
    check_complete(config)
    _check_init(base, config, bool(siblings), start)
    if layers is not None:
        places = getattr(config, "places", None)
        if places is None:
            paths = layer_paths(root, layers, target, getattr(config, "takes", None))
        else:
            paths = module_paths(root, layers, target, places)
        config.target_modules = "|".join(re.escape(path) for path in paths)  # type: ignore
    flags = {name: p.requires_grad for name, p in named_parameters(root).items()}
    before = weights_before(base, asked)
    mesh = root.__dict__.pop("_device_mesh", None)  # peft takes Lightning's for one of transformers
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft asks transformers by an old name
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            warnings.filterwarnings("ignore", ".*rank_pattern keys", RuntimeWarning)  # AdaLoRA's are of another kind
            warnings.filterwarnings("ignore", ".*lora with eva initialization", UserWarning)  # that it needs memory

            def apply(config: PeftConfig) -> PeftModel:
                torch.manual_seed(seed)
                return _apply(base, config, adapter_name, siblings)

            handle = apply(config) if start is None else start.put_in(root, base, config, adapter_name, apply)
    except LightningPeftError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        if start is not None and error is start.failure:  # the user's own
            raise
        raise ConfigError(f"peft cannot put {config.peft_type} into {target!r}: {_reason(error)}") from error
    finally:
        if mesh is not None:
            root.__dict__["_device_mesh"] = mesh
    compute_in_input_dtype(handle)
    _check(handle, adapter_name, target, may_unload=not siblings)
    if handle.get_base_model() is not base or _takes_its_place(config):
        _replace(root, target, handle)
    after = named_parameters(root)
    names = frozenset(
        name
        for name, parameter in after.items()
        if (name == target or name.startswith(f"{target}.")) and parameter.requires_grad
    )
    names -= frozenset().union(*(adapter.names for adapter in siblings))
    if not names:
        raise ConfigError(f"{config.peft_type} has put nothing that trains into {target!r}: no layer fits the method.")
    for name, parameter in after.items():
        if not (name == target or name.startswith(f"{target}.")) and name in flags:
            parameter.requires_grad_(flags[name])
    adapter = Injected(target, adapter_name, asked, seed, handle, names)
    if start is not None:
        adapter.asked, adapter.from_data = start.asked or asked, True
        adapter.initial_factors, adapter.base_marks = start.factors, start.base_marks
    else:
        adapter.initial_factors = initial_factors(handle, adapter_name, before)
    object.__setattr__(root, _MARK, {**root.__dict__.get(_MARK, {}), (target, adapter_name): adapter})
    return adapter


def _check(handle: Any, adapter_name: str, target: str, may_unload: bool) -> None:
    try:
        check_adapted(handle, adapter_name, target)
        check_quantised(handle, adapter_name, target)
    except ConfigError:
        if may_unload and hasattr(handle.base_model, "unload"):
            handle.base_model.unload()
        raise


def activate(root: nn.Module, target: str) -> None:
    """Let exactly the adapters of a target take part in its forward pass that say so; ``requires_grad`` stays.

    Raises:
        ConfigError: If one that is not active is of a kind that takes the model's place.
    """
    adapters = [adapter for (path, _), adapter in injected(root).items() if path == target]
    active = [adapter.adapter_name for adapter in adapters if adapter.is_active]
    handle: Any = adapters[0].handle if adapters else None
    if handle is None or _takes_its_place(handle.peft_config[adapters[0].adapter_name]):
        if len(active) < len(adapters):
            raise ConfigError("An adapter that takes the model's place is always active: leave active=True.")
        return
    tuner = handle.base_model
    if active == list(tuner.active_adapters):
        return
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    tuner.set_adapter(active)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def layer_paths(
    root: nn.Module, layers: str | Sequence[str], target: str, takes: Callable[[nn.Module], bool] | None = None
) -> list[str]:
    """Return the paths, below ``target``, of the layers in a scope of ``root`` that a method takes.

    Args:
        root: The LightningModule.
        layers: A scope of it.
        target: Path of the submodule.
        takes: Whether a module can get an adapter; None: linear, convolution and embedding layers.

    Raises:
        ScopeError: If an entry names no layer below ``target``.
    """
    structure = find_structure(root)
    takes = takes or _is_layer
    adapters = set(structure.roles["adapters"])
    prefix = f"{target}." if target else ""
    chosen: dict[str, None] = {}
    for entry in [layers] if isinstance(layers, str) else layers:
        names: Iterable[str] = match_names(entry, structure)
        owners = [
            path.removesuffix(".base_layer")
            for name in names
            if name not in adapters
            and (module := structure.modules.get(path := name.rpartition(".")[0])) is not None
            and takes(module)
        ]
        below = [path[len(prefix) :] for path in owners if path.startswith(prefix)]
        if not below:
            known = [path for path in structure.modules if path.startswith(prefix)]
            kinds = "linear, convolution or embedding layer" if takes is _is_layer else "layer that the method takes"
            raise ScopeError(f"layers={entry!r} names no {kinds} in {target!r}. " + suggest(entry, known))
        chosen.update(dict.fromkeys(below))
    return list(chosen)


def _is_layer(module: nn.Module) -> bool:
    known = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, known) or type(module).__name__ == "Conv1D"  # of transformers, GPT-2


def _check_init(base: nn.Module, config: Any, has_siblings: bool, start: Start | None) -> None:
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init in _DATA_DRIVEN:
        if start is None:
            raise ConfigError(
                f"init_lora_weights={init!r} ({_DATA_DRIVEN[init]}) starts from a pass over data, which a fit with "
                "Adapter runs; afterwards its checkpoint holds the start."
            )
        if has_siblings:
            raise ConfigError(
                f"init_lora_weights={init!r} ({_DATA_DRIVEN[init]}) looks at the layers of a target that has no other "
                "adapter yet. List it before the others."
            )
    if init == "loftq":
        if any(is_quantized(parameter) for parameter in base.parameters()):
            raise ConfigError(
                "init_lora_weights='loftq' (LoftQ) quantises the weights itself, and keeps the values they round to: "
                "give it the base in full precision, without a quantised precision."
            )
        if not torch.cuda.is_available() and not torch.xpu.is_available():
            raise ConfigError("init_lora_weights='loftq' (LoftQ): peft computes it on a CUDA or XPU device only.")


def _apply(base: nn.Module, config: PeftConfig, adapter_name: str, siblings: list[Injected]) -> PeftModel:
    from peft import get_peft_model

    if not siblings:
        return get_peft_model(base, config, adapter_name=adapter_name)  # type: ignore[return-value, arg-type]
    handle: Any = siblings[0].handle
    handle.add_adapter(adapter_name, config)
    handle.base_model.set_adapter([*(sibling.adapter_name for sibling in siblings), adapter_name])
    return handle


def _takes_its_place(config: PeftConfig) -> bool:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return bool(getattr(config, "is_prompt_learning", False)) or kind in _IN_PLACE_OF_THE_MODEL


def _submodule(root: nn.Module, target: str) -> nn.Module:
    try:
        return root.get_submodule(target)
    except AttributeError:
        children = [name for name, child in root.named_children() if any(True for _ in child.parameters())]
        raise ScopeError(
            f"target={target!r}: {type(root).__name__} has no such submodule. {suggest(target, children)}"
        ) from None


def _replace(root: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, leaf = target.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if text.endswith(".") else f"{text}."
