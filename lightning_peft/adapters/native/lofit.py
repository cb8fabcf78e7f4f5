"""LoFiT: find the attention heads that matter for a task, then train an offset at each of them.

Two runs. Selection: ``z <- (1 + A) * z`` at the output z of every head, with an L1 penalty on the vectors A; the heads
with the longest A are kept. Offsets: ``z <- z + v`` at these heads only. Both act on the input of the projection that
ends attention, which holds the outputs of all query heads side by side. Yin, Ye and Durrett, 2024, arXiv:2406.01563.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.native.bottleneck import PLACES
from lightning_peft.adapters.native.features import add_bias
from lightning_peft.adapters.native.tuner import NativeConfig, NativeLayer, NativeTuner, register
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError, suggest

__all__ = ["LoFiT", "LoFiTConfig", "LoFiTSelection", "top_heads"]

_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")


@dataclass
class LoFiTConfig(NativeConfig):
    """LoFiT: scales at all attention heads that choose some, then offsets at these.

    Args:
        stage: ``"select"`` trains a scale per feature of every head; ``"offset"`` an offset per feature of ``heads``.
        heads: Path of a projection that ends attention -> indices of its heads, from 0; None: all heads of all targets.
        num_heads: Query heads of each attention; None: as the model says.
        init_std: Scales and offsets start normal around 0 with this standard deviation.

    Paper: Yin et al. 2024, arXiv:2406.01563.
    """

    stage: Literal["select", "offset"] = field(default="offset")
    heads: dict[str, list[int]] | None = field(default=None)
    num_heads: int | None = field(default=None)
    init_std: float = field(default=1e-3)

    method: ClassVar[str] = "lofit"
    places: ClassVar[dict[str, str]] = {"attention": PLACES["series"]["attention"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("stage", ("select", "offset"))
        self._check_number("init_std", 0.0, float("inf"))
        if self.dropout:
            raise ConfigError("LoFiTConfig: dropout has no meaning here, the adapter has no input of its own.")
        if self.num_heads is not None and (not isinstance(self.num_heads, int) or self.num_heads < 1):
            raise ConfigError(f"LoFiTConfig: num_heads={self.num_heads!r} is no integer of at least 1.")
        if self.heads is None:
            return
        if self.stage == "select":
            raise ConfigError("LoFiTConfig: heads are what stage='select' finds; they belong to stage='offset'.")
        _check_heads(self.heads)
        if self.target_modules is None:
            self.target_modules = "|".join(re.escape(path) for path in self.heads)


def _check_heads(heads: Any) -> None:
    if not isinstance(heads, Mapping) or not heads:
        raise ConfigError(f"LoFiT: heads={heads!r} is no mapping of module paths to heads.")
    for path, indices in heads.items():
        whole = isinstance(indices, (list, tuple)) and all(isinstance(i, int) and i >= 0 for i in indices)
        if not whole or not indices or len(set(indices)) != len(indices):
            raise ConfigError(f"LoFiT: heads[{path!r}]={indices!r} is no list of different indices from 0.")


class LoFiTLayer(NativeLayer):
    """A projection that ends attention, with scales or offsets at the heads that go into it."""

    prefix = "lofit_"
    trained = ("scale", "offset")
    _added_bias = False

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if the heads are not those of the layer."""
        if self.kind == "conv2d":
            raise ConfigError(f"{path} is a convolution; LoFiT needs the linear projection that ends attention.")
        if self.in_features % config.num_heads:
            raise ConfigError(
                f"{path} takes {self.in_features} features, which are not those of {config.num_heads} heads. Say "
                "num_heads=, or leave it out."
            )
        wrong = [head for head in self.heads(config, path) if head >= config.num_heads]
        if wrong:
            raise ConfigError(f"{path} has {config.num_heads} heads, from 0: head {wrong[0]} is not one of them.")

    @staticmethod
    def heads(config: Any, path: str) -> list[int]:
        """Return the heads of this layer."""
        return list(range(config.num_heads)) if config.heads is None else list(config.heads[path])

    def update_layer(self, adapter_name: str, config: Any, path: str) -> None:
        """Add an adapter, with its initial values."""
        if config.heads is not None:
            config = dataclasses.replace(config, heads={path: config.heads[path]})
        super().update_layer(adapter_name, config, path)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return one scale per feature, or one row of offsets per chosen head."""
        if config.stage == "select":
            return {"scale": (config.num_heads, self.in_features // config.num_heads)}
        count = config.num_heads if config.heads is None else len(next(iter(config.heads.values())))
        return {"offset": (count, self.in_features // config.num_heads)}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return small normal values."""
        return {
            role: torch.randn(shape, generator=generator, dtype=torch.float64) * config.init_std
            for role, shape in self.shapes(config).items()
        }

    def offsets(self, adapter_name: str) -> Tensor:
        """Return what is added to all heads (in,): zero at those that were not chosen."""
        config: Any = self.settings[adapter_name]
        offset = self.tensor("offset", adapter_name)
        if config.heads is None:
            return offset.flatten()
        index = torch.tensor(next(iter(config.heads.values())), device=offset.device)
        return offset.new_zeros(config.num_heads, offset.shape[1]).index_copy(0, index, offset).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Change the outputs of the heads, then project them."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not (self.disable_adapters or self.merged):
            for name in self.active_adapters:
                config: Any = self.settings.get(name)
                if config is None:
                    continue
                if config.stage == "select":
                    x = x * (1 + self.tensor("scale", name).flatten()).to(x.dtype)
                else:
                    x = x + self.offsets(name).to(x.dtype)
        return self.base_layer(x, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the projection of the offsets to the bias; a layer without a bias gets one.

        Raises:
            ConfigError: If the base weight is quantised.
            NotImplementedError: If scales of the selection are active, which are not meant to stay.
        """
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.settings:
                continue
            self._check_mergeable(name)
            bias = self.matrix().to(self.offsets(name).dtype) @ self.offsets(name)
            if safe_merge and not torch.isfinite(bias).all():
                raise ValueError("The merged bias is not finite: the adapter seems to be broken.")
            self._shift_bias(base, bias)
            self.merged_adapters.append(name)

    def _check_mergeable(self, name: str) -> None:
        if getattr(self.settings[name], "stage") == "select":  # noqa: B009
            raise NotImplementedError("scales only choose the heads; train offsets at them and merge these")
        if is_quantized(self.get_base_layer().weight):  # type: ignore[arg-type]
            raise ConfigError(
                "The base weight is quantised, and merging would round it again: use "
                "lightning_peft.precision.merge_adapter(model, dequantize=True)."
            )

    def _shift_bias(self, base: Any, by: Tensor) -> None:
        if base.bias is None:
            add_bias(base, by, "LoFiT")
            self._added_bias = True
        else:
            base.bias.data.copy_((base.bias.to(by.dtype) + by).to(base.bias.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged offsets out of the bias, which is exact up to rounding."""
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            offset = self.offsets(self.merged_adapters.pop())
            self._shift_bias(base, -(self.matrix().to(offset.dtype) @ offset))
        if self._added_bias:
            base.bias, self._added_bias = None, False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that there is no weight that the method adds."""
        return False


class LoFiTTuner(NativeTuner):
    """Puts LoFiT into a model."""

    prefix = "lofit_"
    tuner_layer_cls = LoFiTLayer

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        paths = [path for path, _ in model.named_modules()]
        for path in config.heads or ():
            if path not in paths:
                raise ConfigError(f"LoFiT: heads name {path!r}, which the model does not have. {suggest(path, paths)}")

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if peft_config.num_heads is None:
            count = self._num_heads(parent)
            if count is None:
                raise ConfigError(f"How many heads go into {current_key} is not said by the model. Say num_heads=.")
            peft_config = dataclasses.replace(peft_config, num_heads=count)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)

    def _num_heads(self, parent: nn.Module) -> int | None:
        model_config = self.get_model_config(self.model)
        found = [getattr(parent, name, None) for name in _NUM_HEADS] + [model_config.get(name) for name in _NUM_HEADS]
        return next((count for count in found if isinstance(count, int)), None)


register("lofit", LoFiTConfig, LoFiTTuner)


def top_heads(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, list[int]]:
    """Return the ``count`` heads of highest score, as module path -> indices in ascending order.

    Args:
        scores: Module path -> score of each of its heads.
        count: At least 1, at most the number of heads. Of equal scores the first wins.
    """
    every = [
        (-score, place, path, head) for place, path in enumerate(scores) for head, score in enumerate(scores[path])
    ]
    if not 1 <= count <= len(every):
        raise ConfigError(f"LoFiT: {count} heads of {len(every)} cannot be chosen.")
    chosen: dict[str, list[int]] = {}
    for _, _, path, head in sorted(every, key=lambda item: (item[0], item[1], item[3]))[:count]:
        chosen.setdefault(path, []).append(head)
    return {path: sorted(chosen[path]) for path in scores if path in chosen}


class _Penalty(Driver):
    """Adds the L1 norm of all scales to the loss."""

    adds_loss = True
    sees_whole_parameters = True

    def __init__(self, adapter: Injected, weight: float) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self._weight = weight

    def loss(self) -> Tensor:
        """Return the weighted sum of magnitudes."""
        scales = [layer.tensor("scale", self.adapter_name) for layer in _layers(self.handle).values()]
        return self._weight * torch.stack([scale.abs().sum() for scale in scales]).sum()


def _layers(handle: Any) -> dict[str, LoFiTLayer]:
    modules = handle.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, LoFiTLayer)}


class LoFiTSelection(Adapter):
    """Find the attention heads that a task needs: the first of LoFiT's two runs.

    Trains one scale per feature of every head, as many as the model is wide per block, with a penalty on their
    magnitudes. Nothing of it stays but the list of heads.

    Use it before :class:`LoFiT`, on the same data, for a few epochs.

    Args:
        fraction: Of all heads, how many are chosen: the paper takes 0.03 to 0.1.
        l1: Weight of the penalty on the sum of magnitudes.
        heads_file: JSON file that gets the chosen heads when the fit ends; None: none.
        layers: The projections that end attention: ``"attention"`` finds them by the names that models give them; or
            paths, globs, ``re:`` or ``class:`` patterns of modules.
        num_heads: Query heads of each attention; None: as the model says.
        init_std: Scales start normal around 0 with this standard deviation.
        target: Path of the submodule that gets the scales.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import LoFiTSelection
        >>> LoFiTSelection(fraction=0.05, heads_file="heads.json").config["stage"]
        'select'

    Paper:
        F. Yin, X. Ye, G. Durrett: LoFiT: Localized Fine-tuning on LLM Representations, NeurIPS 2024, arXiv:2406.01563.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        l1: float = 5e-4,
        heads_file: str | None = None,
        layers: str | list[str] = "attention",
        num_heads: int | None = None,
        init_std: float = 1e-3,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"stage": "select", "num_heads": num_heads, "init_std": init_std, "seed": seed}
        super().__init__("lofit", config, target, layers, adapter_name, always, seed)
        if not 0 < fraction <= 1:
            raise ConfigError(f"LoFiTSelection: fraction={fraction!r} is not in (0, 1].")
        if l1 < 0:
            raise ConfigError(f"LoFiTSelection: l1={l1!r} is negative.")
        self.fraction, self.l1, self.heads_file = fraction, l1, heads_file
        self.num_heads, self.init_std = num_heads, init_std

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return _Penalty(adapter, self.l1)

    @torch.no_grad()
    def scores(self) -> dict[str, list[float]]:
        """Return the length of each head's vector of scales, by path of the projection below the target."""
        return {
            path: layer.tensor("scale", self.adapter_name).float().norm(dim=1).tolist()
            for path, layer in _layers(self.handle).items()
        }

    def heads(self) -> dict[str, list[int]]:
        """Return the chosen heads, as :class:`LoFiT` takes them."""
        scores = self.scores()
        return top_heads(scores, max(1, int(self.fraction * sum(map(len, scores.values())))))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if self.heads_file is not None and trainer.is_global_zero:
            Path(self.heads_file).write_text(json.dumps(self.heads(), indent=1) + "\n")


class LoFiT(Adapter):
    """Train an offset at the output of some attention heads.

    ``heads * head_dim`` parameters for the model: a hundredth of LoRA's and less. Merged into the bias of the
    projection after the heads it costs nothing in use.

    Use it to steer a language model with a few hundred examples. :class:`LoFiTSelection` finds the heads.

    Args:
        heads: What :meth:`LoFiTSelection.heads` returns, or a file that it wrote; None: all heads.
        layers: The projections that end attention, if ``heads`` is None: ``"attention"`` finds them by the names that
            models give them; or paths, globs, ``re:`` or ``class:`` patterns of modules.
        num_heads: Query heads of each attention; None: as the model says.
        init_std: Offsets start normal around 0 with this standard deviation; 0 starts exactly at the base.
        target: Path of the submodule that gets the offsets.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import LoFiT
        >>> LoFiT(heads={"model.layers.3.self_attn.o_proj": [0, 7]}).method
        'lofit'

    Paper:
        F. Yin, X. Ye, G. Durrett: LoFiT: Localized Fine-tuning on LLM Representations, NeurIPS 2024, arXiv:2406.01563.
    """

    def __init__(
        self,
        heads: dict[str, list[int]] | str | None = None,
        layers: str | list[str] = "attention",
        num_heads: int | None = None,
        init_std: float = 1e-3,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.heads = _read_heads(heads) if isinstance(heads, str) else heads
        config: dict[str, Any] = {"stage": "offset", "num_heads": num_heads, "init_std": init_std, "seed": seed}
        config["heads"] = self.heads
        chosen = layers if self.heads is None else None
        super().__init__("lofit", config, target, chosen, adapter_name, always, seed)
        self.num_heads, self.init_std = num_heads, init_std


def _read_heads(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"LoFiT: heads={path!r} cannot be read as JSON: {error}") from error
