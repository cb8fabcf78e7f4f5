"""Starts that come from data: ``peft``'s own EVA, CorDA and LoRA-GA, and LoRA-SB, over batches of the run.

The pass happens once, before the first fit: after the model has been built and quantised, before it is wrapped or
sharded and before ``configure_optimizers`` (EVA decides about ranks). Samples are read by index beside the loader, the
same on all ranks; the module's own ``training_step`` runs them, and nothing but the adapter and its base remembers it.

CorDA and LoRA-GA subtract the product they start with from the base. A checkpoint holds those factors, from which the
changed base is computed again, bit for bit, and a fingerprint of the base as it was: no batch is needed to go on.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY
from lightning_peft.adapters.injection import asked_for, injected
from lightning_peft.adapters.starts import FromCheckpoint, Start, change_base, convert_all
from lightning_peft.core.draw import draw_generator
from lightning_peft.core.names import named_parameters, parameter_aliases
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError, UnsupportedStrategy
from lightning_peft.methods.batches import sample_batches
from lightning_peft.methods.scoring import scoring_loss, without_trace

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["FromBatches", "find_start"]

_MOST_ROUNDS = 100  # how often EVA may see each batch until its directions hold still


class FromBatches(Start):
    """The start that ``peft`` computes from batches of the training data.

    Args:
        trainer: The Trainer, at the start of a fit.
        pl_module: Its module.
        num_batches: Batches of the training loader's own size, at most.
        seed: Of the draw of the batches.
        label: Who asks, for errors.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, num_batches: int, seed: int, label: str) -> None:
        super().__init__()
        self._trainer, self._module = trainer, pl_module
        self._num_batches, self._seed, self._label = num_batches, seed, label
        self._waiting: Any = None  # put in, and without its start
        self._mask: Tensor | None = None  # of the texts that the target runs on

    @override
    def put_in(
        self, root: nn.Module, base: nn.Module, config: Any, adapter_name: str, apply: Callable[[Any], PeftModel]
    ) -> PeftModel:
        self._check_place(base)
        flags = [(parameter, parameter.requires_grad) for parameter in self._module.parameters()]
        try:
            with _on_device(self._module, self._trainer.strategy.root_device):
                if not hasattr(config, "init_lora_weights"):
                    return self._lora_sb(config, adapter_name, apply)
                config.init_lora_weights = str(config.init_lora_weights).lower()
                if config.init_lora_weights == "eva":
                    return self._eva(config, adapter_name, apply)
                return self._change_the_base(root, base, config, adapter_name, apply)
        except BaseException:
            if self._waiting is not None:
                self._waiting.base_model.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise

    # ------------------------------------------------------------------ what is common

    def _check_place(self, base: nn.Module) -> None:
        strategy = self._trainer.strategy
        if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise UnsupportedStrategy(
                f"{self._label} starts from a pass over data through the whole model, which "
                f"{type(strategy).__name__} does not allow before it has sharded it. Use FSDP2Strategy or DDP, or put "
                "in a start from a checkpoint."
            )
        parameters = list(self._module.parameters())
        whole = not any(parameter.is_meta or hasattr(parameter, "_local_tensor") for parameter in parameters)
        if not strategy.reduce_boolean_decision(whole, all=True):
            raise ConfigError(
                f"{self._label} starts from a pass over data, and the model has no weights yet or is sharded already. "
                "Build it with its weights, on every rank, and leave sharding to the strategy; or calibrate on one "
                "device and go on from that checkpoint."
            )

    def _batches(self) -> list[Any]:
        source = self._trainer.fit_loop._data_source
        loaders = _request_dataloader(source) if source.is_defined() else None
        if loaders is None:
            raise ConfigError(f"{self._label} starts from data, and this fit has no training loader.")
        generator = draw_generator(self._seed, 0, "calibration")
        try:
            batches = sample_batches(self._trainer, loaders, self._num_batches, generator, same_on_all_ranks=True)
        except ConfigError as error:
            raise ConfigError(f"{self._label} starts from data. {error}") from error
        if not batches:
            raise ConfigError(f"{self._label} starts from data: give it at least one batch.")
        return batches

    def _watch_masks(self, base: nn.Module, eva_config: Any = None) -> None:
        """Notice the mask that each call of ``base`` gets, or else the one in the batch."""
        signature = inspect.signature(base.forward)
        rest = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            for name in rest:
                given = {**given, **given.get(name, {})}
            found = (_mask(each, eva_config) for each in (given, *given.values(), self._batch))
            self._mask = next((mask for mask in found if mask is not None), None)

        base.register_forward_pre_hook(hook, with_kwargs=True)

    def _loss(self, batch: Any) -> Tensor:
        self._batch = batch
        try:
            return scoring_loss(self._trainer, self._module, batch)
        except Exception as error:
            self.failure = error
            raise

    def _unused(self, paths: list[str]) -> ConfigError:
        return ConfigError(
            f"{self._label}: training_step does not use {len(paths)} of the layers, {paths[0]!r} for one, so that they "
            "have no start. Leave them out of the adapter."
        )

    # ------------------------------------------------------------------ EVA

    def _eva(self, config: Any, adapter_name: str, apply: Callable[[Any], PeftModel]) -> PeftModel:
        from peft import EvaConfig, get_eva_state_dict, initialize_lora_eva_weights
        from peft.tuners.lora.eva import UNSUPPORTED_LORA_MODULES

        config.eva_config = config.eva_config or EvaConfig()
        handle: Any = apply(config)
        self._waiting = handle
        shapes: dict[str, torch.Size] = {}
        needed = {
            name: round(_rank(config, name) * config.eva_config.rho)
            for name, module in handle.named_modules()
            if hasattr(module, "base_layer") and not isinstance(module, UNSUPPORTED_LORA_MODULES)
        }

        def rows(layer_input: Any, _: Any, name: str) -> Tensor:
            found = _rows(layer_input if isinstance(layer_input, Tensor) else layer_input[0], self._mask)
            shapes.setdefault(name, found.shape)
            return found

        passes = 0

        def forward(_: nn.Module, batch: _Sealed) -> None:
            nonlocal passes
            passes += 1
            self._loss(batch.content)
            unused = [_below(name) for name in needed if name not in shapes]
            if unused:
                raise self._unused(unused)
            poor = [name for name, most in needed.items() if min(shapes[name]) < 2 * most]
            if poor:
                rows, width = shapes[poor[0]]
                raise ConfigError(
                    f"{self._label}: {_below(poor[0])!r} sees {rows} inputs of width {width} in a batch, and up to "
                    f"{needed[poor[0]]} ranks (rank times rho) want twice as many of both. Use larger batches, or a "
                    "smaller rank or rho."
                )
            if passes > 1 + _MOST_ROUNDS * len(batches):
                raise ConfigError(
                    f"{self._label}: directions still turn after {_MOST_ROUNDS} rounds over {len(batches)} batch(es). "
                    "Take more batches, or a smaller tau in eva_config."
                )

        with _pass_over(self._module):
            batches = [_Sealed(batch) for batch in self._batches()]
            self._module.eval()
            self._watch_masks(handle.get_base_model(), config.eva_config)
            found = get_eva_state_dict(
                handle,
                batches,
                forward_fn=forward,
                prepare_model_inputs_fn=lambda batch, _: None,
                prepare_layer_inputs_fn=rows,
                adapter_name=adapter_name,
                gather_distributed_inputs=False,  # all ranks have the same
                show_progress_bar=False,
            )
        found = self._trainer.strategy.broadcast({name: value.cpu() for name, value in found.items()})
        initialize_lora_eva_weights(handle, eva_state_dict=found, adapter_name=adapter_name)
        handle.base_model._cast_adapter_dtype(adapter_name=adapter_name)  # layers with a new rank are new
        return handle

    # ------------------------------------------------------------------ CorDA and LoRA-GA

    def _change_the_base(
        self, root: nn.Module, base: nn.Module, config: Any, adapter_name: str, apply: Callable[[Any], PeftModel]
    ) -> PeftModel:
        from peft.tuners.lora.loraga import get_target_modules

        _resolve_targets(base, config, self._label)
        layers: dict[str, Any] = dict(get_target_modules(base, config))
        self._check_layers(root, config, layers)
        originals = {path: layer.weight.detach().cpu().clone() for path, layer in layers.items()}
        with _pass_over(self._module):
            batches = self._batches()
            prepare = self._corda if config.init_lora_weights == "corda" else self._lora_ga
            prepare(base, config, layers, batches)
        handle = apply(config)
        if isinstance(self._trainer.strategy, ModelParallelStrategy):  # elsewhere they train in float32
            convert_all(self._trainer, self._module)
        factors = {path: _factors(handle, path, adapter_name) for path in layers}
        self.factors = self._trainer.strategy.broadcast(factors)
        self.base_marks = change_base(root, handle, adapter_name, self.factors, originals)
        return handle

    def _check_layers(self, root: nn.Module, config: Any, layers: Mapping[str, Any]) -> None:
        names: dict[str, list[str]] = {}
        for alias, name in parameter_aliases(root).items():
            names.setdefault(name, []).append(alias)
        canonical = {id(parameter): name for name, parameter in named_parameters(root).items()}
        if not layers:
            raise ConfigError(f"{self._label} finds no linear layer: its start is computed for those alone.")
        for path, layer in layers.items():
            if is_quantized(layer.weight):
                raise ConfigError(
                    f"{self._label} changes the weights it starts from, and {path!r} is quantised. Use EVA, or "
                    "calibrate in full precision."
                )
            shared = names[canonical[id(layer.weight)]]
            if len(shared) > 1:
                raise ConfigError(
                    f"{self._label} changes the weight of {path!r}, which is tied ({', '.join(shared)}). Leave this "
                    "layer out."
                )
            most, rank = min(layer.weight.shape), _rank(config, path)
            if rank * (2 if config.init_lora_weights == "lora_ga" else 1) > most:
                raise ConfigError(
                    f"{self._label}: rank {rank} is too large for {path!r}, whose smaller side is {most}"
                    + ("; it takes twice as many directions." if config.init_lora_weights == "lora_ga" else ".")
                )

    def _corda(self, base: nn.Module, config: Any, layers: Mapping[str, nn.Module], batches: list[Any]) -> None:
        """Covariances of the inputs, of any shape: ``peft``'s hooks sit on stand-ins that get them as it wants them."""
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = config.corda_config or CordaConfig()
        stand_ins = _stand_ins(layers)

        def show(stand_in: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                rows = _rows(inputs[0], self._mask)
                if len(rows):
                    stand_in(rows[None])

            return hook

        def run() -> None:
            for path, layer in layers.items():
                layer.register_forward_pre_hook(show(stand_ins.get_submodule(path)))
            self._module.eval()
            self._watch_masks(base)
            for batch in batches:
                self._loss(batch)
            unused = [path for path in layers if not stand_ins.get_submodule(path).sample_count]
            if unused:
                raise self._unused(unused)

        preprocess_corda(base, config, run_model=run, hooked_model=stand_ins)

    def _lora_ga(self, base: nn.Module, config: Any, layers: Mapping[str, nn.Module], batches: list[Any]) -> None:
        """Gradients in the mode the module trains in, which ``peft`` would change."""
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
        modes = {module: module.training for module in self._module.modules()}
        self._module.requires_grad_(False)  # peft turns on what it wants

        def run() -> None:
            for module, mode in modes.items():
                module.training = mode
            torch.manual_seed(self._seed)
            for batch in batches:
                self._loss(batch).backward()
            unused = [path for path, layer in layers.items() if not layer._peft_loraga_grad_count]
            if unused:
                raise self._unused(unused)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)  # on the first layer
            preprocess_loraga(base, config, run)

    # ------------------------------------------------------------------ LoRA-SB

    def _lora_sb(self, config: Any, adapter_name: str, apply: Callable[[Any], PeftModel]) -> PeftModel:
        from lightning_peft.adapters.native.lora_sb import calibrate_lora_sb

        self._waiting = handle = apply(config)
        with without_trace(self._module):
            batches = self._batches()
        torch.manual_seed(self._seed)  # inject gives the state back
        calibrate_lora_sb(self._module, batches, self._loss, adapter_name=adapter_name)
        return handle


def find_start(
    trainer: Trainer,
    pl_module: LightningModule,
    config: PeftConfig,
    *,
    target: str,
    adapter_name: str,
    layers: Any,
    num_batches: int,
    seed: int,
    label: str,
) -> tuple[Start | None, bool]:
    """Return where an adapter gets its start from, and whether it has to wait for a fit.

    Args:
        trainer: The Trainer, where the model has just been built.
        pl_module: Its module.
        config: Of the adapter.
        target: Path of the target.
        adapter_name: Name of the adapter.
        layers: As they were asked for.
        num_batches: Of a pass over data.
        seed: Of the draw of the batches.
        label: Who asks, for errors.

    Returns:
        None if the adapter is there already, or needs no data; True if there is neither a fit nor a checkpoint.

    Raises:
        ConfigError: If the checkpoint that is loaded holds no such start, or one of other settings.
    """
    from lightning_peft.strategies.partial_state import argument_of_fit

    if (target, adapter_name) in injected(pl_module) or not _starts_from_data(config):
        return None, False
    path = argument_of_fit("ckpt_path")
    if path:
        entry = _entry(trainer, path, target, adapter_name)
        if entry is not None and "start" in entry:
            now, then = asked_for(config, layers), entry["start"]["asked"]
            changed = sorted(key for key in {*now, *then} if now.get(key) != then.get(key))
            if changed:
                raise ConfigError(
                    f"{label}: the checkpoint's start was made for other settings ({', '.join(changed)}). Use its "
                    "settings, or start anew."
                )
            return FromCheckpoint(entry), False
        if hasattr(config, "init_lora_weights"):
            raise ConfigError(f"{label} starts from data, and {str(path)!r} holds no start for it.")
        return None, False  # LoRA-SB's factors are all in the weights
    if trainer.state.fn != TrainerFn.FITTING:
        rank_zero_info(f"{label} is put in by a fit or with a checkpoint; until then the model is its base.")
        return None, True
    if not hasattr(config, "init_lora_weights") and num_batches == 0:
        return None, False
    return FromBatches(trainer, pl_module, num_batches, seed, label), False


def _starts_from_data(config: Any) -> bool:
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return kind == "lora_sb" or str(getattr(config, "init_lora_weights", "")).lower() in ("eva", "corda", "lora_ga")


def _entry(trainer: Trainer, path: str | Path, target: str, adapter_name: str) -> dict[str, Any] | None:
    from lightning_peft.strategies.partial_state import read_metadata, weights_only_of_fit

    if "://" in str(path):
        saved = trainer.strategy.load_checkpoint(path, weights_only=weights_only_of_fit())
    else:
        saved = read_metadata(trainer.strategy, path)
    for entry in saved.get(CHECKPOINT_KEY, {}).get("adapters", ()):
        if (entry["target"], entry["adapter_name"]) == (target, adapter_name):
            return entry
    return None


@torch.no_grad()
def _factors(handle: PeftModel, path: str, adapter_name: str) -> tuple[Tensor, Tensor]:
    layer: Any = handle.get_base_model().get_submodule(path)
    A_RI, B_OR = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return A_RI.detach().cpu().clone(), B_OR.detach().cpu().clone()


# ---------------------------------------------------------------------- batches and layers


class _Sealed:
    """A batch that ``peft`` does not look into: it knows dictionaries of tensors only."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, device: Any) -> _Sealed:
        return self


def _mask(texts: Any, eva_config: Any = None) -> Tensor | None:
    """Return which positions (batch, length) of texts are no padding, and have a label if EVA wants one."""
    if not isinstance(texts, Mapping):
        return None
    mask, labels = texts.get("attention_mask"), texts.get("labels")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = mask.bool()
    if eva_config is not None and eva_config.use_label_mask and getattr(labels, "shape", None) == mask.shape:
        mask = mask & (labels != eva_config.label_mask_value)
    return mask


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs of a layer as rows; those under ``mask`` alone, if it fits."""
    x = x.detach()
    return x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])


class _StandIn(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1, 1, bias=False, device="meta")

    @override
    def forward(self, input: Tensor) -> Tensor:
        return input


def _stand_ins(paths: Mapping[str, Any]) -> nn.Module:
    """Return a module with a stand-in at each of ``paths``."""
    root = nn.Module()
    for path in paths:
        node = root
        *parents, leaf = path.split(".")
        for name in parents:
            if name not in node._modules:
                node.add_module(name, nn.Module())
            node = node.get_submodule(name)
        node.add_module(leaf, _StandIn())
    return root


def _resolve_targets(base: nn.Module, config: Any, label: str) -> None:
    """Write down which layers ``peft`` would take, before it is asked to put the adapter in."""
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    if config.target_modules is None:
        kind = LoraModel.get_model_config(base).get("model_type")
        known = LoraModel.target_module_mapping.get(kind or "")
        if known is None:
            raise ConfigError(f"{label}: peft does not know this model's layers. Say layers or target_modules.")
        config.target_modules = set(known)
    _maybe_include_all_linear_layers(config, base)


def _rank(config: Any, path: str) -> int:
    from peft.utils.other import get_pattern_key

    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)


def _below(name: str) -> str:
    return name.removeprefix("base_model.model.")


@contextmanager
def _on_device(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a model where it will train, as long as this lasts; one spread over several devices stays."""
    places = {tensor.device for tensor in (*root.parameters(), *root.buffers())}
    home = places.pop()
    if places or home == device:
        yield
        return
    root.to(device)
    try:
        yield
    finally:
        root.to(home)


@contextmanager
def _pass_over(module: LightningModule) -> Iterator[None]:
    """A pass without a trace, also of hooks and ``requires_grad``, which ``peft`` leaves if it fails."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [(each, kind, copy.copy(getattr(each, kind))) for each in module.modules() for kind in kinds]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with without_trace(module):
            yield
    finally:
        for each, kind, before in hooks:
            present = getattr(each, kind)
            for key in [key for key in present if key not in before]:
                del present[key]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
