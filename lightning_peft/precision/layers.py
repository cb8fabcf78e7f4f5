"""Quantise the linear layers of any model in place, and turn them back: plain functions without Lightning.

The order of quantising and injecting adapters does not matter. Only base layers are quantised, never what ``peft``
injected; a LoRA layer that was there first becomes the one that peft itself would have put over a quantised layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.names import named_modules
from lightning_peft.core.scope import match_names, resolve_scope
from lightning_peft.core.trainable import parameter_fingerprints
from lightning_peft.errors import ConfigError, ScopeError, suggest

__all__ = [
    "Backend",
    "Mode",
    "adopt",
    "base_fingerprint",
    "check_mode",
    "dequantize",
    "dequantize_layers",
    "hidden_weights",
    "merge_adapter",
    "quantize",
    "quantized_bytes",
    "quantized_layers",
]

Mode = Literal["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"]
"""How a weight is stored.

``nf4``: 4 bits, levels of equal probability under a normal distribution, one float32 scale per 64 weights (4.5 bits).
``fp4``: 4-bit floating point, same scales. ``-dq``: the scales are quantised to 8 bits too (4.13 bits).
``int8``: 8 bits, one float32 scale per output.
"""

Backend = Literal["bitsandbytes", "torchao"]
"""Library that holds and multiplies the weights."""

_TORCHAO_MODES = ("nf4", "nf4-dq", "int8")
_NOTED = "_lightning_peft_fingerprint"


def check_mode(mode: str, backend: str) -> None:
    """Check that ``backend`` knows ``mode``.

    Raises:
        ConfigError: If it does not, with the nearest choice.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r} is unknown. {suggest(str(backend), get_args(Backend))}")
    choices = _TORCHAO_MODES if backend == "torchao" else get_args(Mode)
    if mode not in choices:
        raise ConfigError(f"mode={mode!r} is not a mode of {backend}. {suggest(str(mode), choices)}")


def quantized_layers(root: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield clean path and module of every linear layer below ``root`` whose weight is quantised."""
    for path, module in named_modules(root):
        if isinstance(module, nn.Linear) and _kind(module):
            yield path, module


def _kind(module: nn.Module) -> Backend | None:
    names = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    if "bitsandbytes" in names:
        from lightning_peft.precision.bnb import is_bnb

        return "bitsandbytes" if is_bnb(module) else None
    weight = module._parameters.get("weight")
    if weight is not None and type(weight.data).__module__.startswith("torchao."):
        return "torchao"
    return None


def quantize(
    root: nn.Module,
    mode: Mode = "nf4",
    *,
    scope: str | Sequence[str] = "all",
    skip: str | Sequence[str] = ("embeddings", "head"),
    backend: Backend = "bitsandbytes",
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> list[str]:
    """Quantise the weights of the linear layers below ``root``, in place.

    What stays in floating point: everything that is no ``torch.nn.Linear``, biases, adapters, weights that are tied to
    another module's, and what ``skip`` names. Layers that are quantised already stay as they are. A quantised weight
    has ``requires_grad=False``.

    Args:
        root: Any module, with weights in memory.
        mode: How weights are stored.
        scope: Which layers: roles, names, patterns or classes, as in every method's ``scope``.
        skip: Which of them not. A role the model does not have is ignored.
        backend: ``"bitsandbytes"`` or ``"torchao"``.
        compute_dtype: Dtype the weights are dequantised to for a multiplication; None: that of the input.
        device: Where weights are quantised and left; None: where they are.

    Returns:
        Paths of the layers quantised now, in model order.

    Raises:
        ConfigError: If the backend does not know the mode, or weights are on the meta device or sharded already.
        ScopeError: If ``scope`` or ``skip`` matches nothing, or there is no linear layer to quantise.
    """
    check_mode(mode, backend)
    adopt(root)
    chosen = _choose(root, scope, skip)
    if not chosen and not any(True for _ in quantized_layers(root)):
        kinds = sorted({type(module).__name__ for module in root.modules() if not any(True for _ in module.children())})
        raise ScopeError(
            f"scope={scope!r} without skip={skip!r} holds no torch.nn.Linear whose weight could be quantised. "
            f"The model's layers are: {', '.join(kinds)}."
        )
    _check_storage(chosen)
    backend_module = _backend(backend)
    for path, linear in chosen.items():
        layer = backend_module.quantize_linear(linear, mode, device)
        if backend == "bitsandbytes":
            layer.compute_dtype = compute_dtype
            layer.compute_type_is_set = True
        _replace(root, path, linear, layer)
    _flag(root)
    _match_peft_layers(root)
    for _, layer in quantized_layers(root):
        _note_fingerprint(layer)
    return list(chosen)


def _backend(backend: Backend) -> Any:
    if backend == "bitsandbytes":
        return importlib.import_module("lightning_peft.precision.bnb")
    try:
        return importlib.import_module("lightning_peft.precision.torchao")
    except ImportError as error:
        raise ConfigError(
            f"backend='torchao' needs torchao: pip install 'lightning_peft[torchao]' ({error})."
        ) from error


def _choose(root: nn.Module, scope: str | Sequence[str], skip: str | Sequence[str]) -> dict[str, nn.Linear]:
    structure = find_structure(root)
    wanted = _resolve(scope, structure, "scope")
    unwanted = _resolve(skip, structure, "skip") | set(structure.roles["adapters"])
    owners: dict[str, int] = {}
    for canonical in structure.aliases.values():
        owners[canonical] = owners.get(canonical, 0) + 1
    chosen: dict[str, nn.Linear] = {}
    for path, module in structure.modules.items():
        name = f"{path}.weight" if path else "weight"
        plain = type(module) is nn.Linear and _kind(module) is None and name in structure.parameters
        if plain and name in wanted and name not in unwanted and owners[name] == 1:
            chosen[path] = module  # pyright: ignore[reportArgumentType]
    return chosen


def _resolve(entries: str | Sequence[str], structure: Any, argument: str) -> set[str]:
    """The names that entries stand for, quantised tensors (which a scope refuses) left out."""
    names: set[str] = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        if entry in structure.roles:
            names.update(structure.roles[entry])
        elif entry.startswith("!"):
            names -= _resolve(entry[1:], structure, argument)
        else:
            try:
                names.update(resolve_scope(entry, structure, argument=argument).names)
            except ScopeError:
                if not match_names(entry, structure):
                    raise
    return names


def _check_storage(chosen: dict[str, nn.Linear]) -> None:
    meta = [path for path, linear in chosen.items() if linear.weight.is_meta]
    if meta:
        raise ConfigError(
            f"{len(meta)} layer(s) have no weights yet (meta device), {meta[0]} for one: load the weights before they "
            "are quantised."
        )
    sharded = [path for path, linear in chosen.items() if hasattr(linear.weight, "_local_tensor")]
    if sharded:
        raise ConfigError(
            f"{len(sharded)} layer(s) are sharded already, {sharded[0]} for one, and a shard cannot be quantised. In "
            "configure_model, call self.trainer.precision_plugin.quantize(model) before fully_shard; FSDP2Strategy "
            "shards after the model has been quantised."
        )


def _replace(root: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered; ``path`` alone would miss a module that is used several times."""
    found = False
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
                found = True
    if not found:
        raise ConfigError(
            f"{path or 'The module itself'} is a linear layer that nothing holds: give quantize() the module around it."
        )


def adopt(root: nn.Module) -> None:
    """Take over all layers below ``root`` that something else has quantised: no bit changes, see ``precision.bnb``."""
    for _, layer in quantized_layers(root):
        kind = _kind(layer)
        assert kind is not None
        _backend(kind).adopt(layer)


def _flag(root: nn.Module) -> None:
    """Tell ``peft``, which asks the model it injects into, that layers below are quantised by bitsandbytes."""
    layers = {path: layer for path, layer in quantized_layers(root) if _kind(layer) == "bitsandbytes"}
    for path, module in named_modules(root):
        prefix = f"{path}." if path else ""
        inside = [type(layer).__name__ for name, layer in layers.items() if name != path and name.startswith(prefix)]
        if inside:
            owner: Any = module
            owner.is_loaded_in_8bit = "Linear8bit" in inside
            owner.is_loaded_in_4bit = "Linear4bit" in inside


def _peft_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in named_modules(root):
        if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
            yield path, module


def _match_peft_layers(root: nn.Module) -> None:
    """Turn adapter layers that were injected over plain layers into peft's own for quantised ones.

    Both kinds hold the same tensors under the same names; they differ in how they merge and cast.
    """
    for _, layer in _peft_layers(root):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or _kind(base) != "bitsandbytes":
            continue
        suffix = "8bitLt" if type(base).__name__ == "Linear8bit" else "4bit"
        package, _, module_name = type(layer).__module__.rpartition(".")
        if module_name != "layer":
            continue
        try:
            counterparts = importlib.import_module(f"{package}.bnb")
        except ImportError:
            continue
        counterpart = getattr(counterparts, type(layer).__name__ + suffix, None)
        if counterpart is not None:
            layer.__class__ = counterpart


def _note_fingerprint(layer: nn.Module) -> None:
    if not hasattr(layer, _NOTED) and not any(t.is_meta or hasattr(t, "_local_tensor") for t in _codes(layer)):
        setattr(layer, _NOTED, _fingerprint(layer))


def _codes(layer: nn.Module) -> list[torch.Tensor]:
    """Everything that a quantised weight consists of."""
    owner: Any = layer
    weight = owner.weight
    if _kind(layer) == "torchao":
        names, _ = weight.data.__tensor_flatten__()
        return [getattr(weight.data, name) for name in names]
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.offset, state.state2.absmax] if state.nested else []
        return [weight.data, state.absmax, *nested]
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else owner.state.SCB
    return [weight.data, scales]


def _fingerprint(layer: nn.Module) -> int:
    parts = parameter_fingerprints(tensor.reshape(-1) for tensor in _codes(layer))
    total = 0
    for part in parts:
        total = (total * 1_000_003 + part) % (1 << 62)
    return total


def base_fingerprint(root: nn.Module) -> dict[str, int]:
    """Return an integer per quantised layer that changes with every bit of its codes and scales.

    It is taken once, when the layer is quantised, since a shard of it could not be compared later.
    """
    return {
        path: noted for path, layer in quantized_layers(root) if (noted := getattr(layer, _NOTED, None)) is not None
    }


def quantized_bytes(root: nn.Module) -> int:
    """Return the bytes of all quantised weights below ``root``, scales included."""
    return sum(tensor.nbytes for _, layer in quantized_layers(root) for tensor in _codes(layer))


@contextmanager
def hidden_weights(root: nn.Module | None) -> Iterator[None]:
    """Leave quantised weights out of every state dict of ``root`` (None: nothing) for the time of the context."""
    handles = [] if root is None else [h.register_state_dict_post_hook(_drop_weight) for _, h in quantized_layers(root)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    own = {f"{prefix}{leaf}" for leaf in ("weight", "SCB", "weight_format")}
    for key in [key for key in state_dict if key in own or key.startswith(f"{prefix}weight.")]:
        del state_dict[key]


@torch.no_grad()
def dequantize(layer: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) that a quantised linear layer computes with, in the dtype it was quantised from.

    Raises:
        ConfigError: If ``layer`` has no quantised weight.
    """
    if not isinstance(layer, nn.Linear) or _kind(layer) is None:
        raise ConfigError(f"{type(layer).__name__} has no quantised weight to turn back.")
    weight: Any = layer.weight
    if _kind(layer) == "bitsandbytes":
        if getattr(weight, "quant_state", None) is not None:
            from lightning_peft.precision.bnb import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state).detach()
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).detach()
    data = weight.data
    plain = data.get_original_weight() if hasattr(data, "get_original_weight") else data.dequantize()
    return plain.detach()


def dequantize_layers(root: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Put a plain ``torch.nn.Linear`` in the place of every quantised layer below ``root``.

    Args:
        root: Any module.
        dtype: Dtype of the weights; None: the one they were quantised from.

    Returns:
        The layers' paths. The weights are what the quantised layers computed with, not what they were before.
    """
    layers = dict(quantized_layers(root))
    for path, layer in layers.items():
        weight = dequantize(layer)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
        plain.bias = layer.bias
        _replace(root, path, layer, plain.train(layer.training))
    for module in root.modules():
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if layers and getattr(module, flag, False):
                setattr(module, flag, False)
    return list(layers)


def merge_adapter(root: nn.Module, *, dequantize: bool = False, dtype: torch.dtype | None = None) -> list[str]:
    """Merge all active adapters below ``root`` into their base layers, and take the adapter layers out.

    Args:
        root: A model with layers of peft.
        dequantize: Turn quantised base layers into plain ones first, so that nothing is rounded again. The model then
            takes as much memory as an unquantised one.
        dtype: Dtype of base weights that are dequantised; None: the one they were quantised from.

    Returns:
        Paths of the merged layers.

    Raises:
        ConfigError: If a base layer is quantised and ``dequantize`` is False, or there is no adapter.
    """
    layers = dict(_peft_layers(root))
    if not layers:
        raise ConfigError("merge_adapter: the model has no adapter layers of peft.")
    quantised = [path for path, layer in layers.items() if _kind(layer.get_base_layer())]
    if quantised and not dequantize:
        raise ConfigError(
            f"{len(quantised)} base layer(s) are quantised, {quantised[0]} for one. A merge would round base plus "
            "adapter to the same few levels again, and much of what the adapter learned is smaller than half a level. "
            "Say dequantize=True for a merged model in floating point, or keep the adapter beside the base."
        )
    if quantised:
        for _, layer in layers.items():
            _unmatch_peft_layer(layer)
        dequantize_layers(root, dtype)
    for path, layer in layers.items():
        layer.merge(safe_merge=True)
        _replace(root, path, layer, layer.get_base_layer())
    return list(layers)


def _unmatch_peft_layer(layer: Any) -> None:
    """Turn peft's layer over a quantised base into its layer over a plain one."""
    package, _, module_name = type(layer).__module__.rpartition(".")
    plain_name = type(layer).__name__.removesuffix("4bit").removesuffix("8bitLt").replace("TorchaoLora", "")
    if module_name not in ("bnb", "torchao"):
        return
    plain = getattr(importlib.import_module(f"{package}.layer"), plain_name, None)
    if plain is None:
        raise ConfigError(f"peft has no plain layer for {type(layer).__name__}, so that it cannot be merged.")
    layer.__class__ = plain
    layer.fan_in_fan_out = False
    layer.is_target_conv_1d_layer = False
