"""Visual prompt tuning: train tokens that are put into the sequence of a vision transformer, and nothing else of it.

``[x_0, P_i, x_1 ... x_n]`` goes into block i instead of ``[x_0, x_1 ... x_n]``. In the deep form every block has
prompts of its own, and what becomes of them is cut off behind it; in the shallow form the first block's stay until the
last. M. Jia, L. Tang, B.-C. Chen, C. Cardie, S. Belongie, B. Hariharan and S.-N. Lim, ECCV 2022, arXiv:2203.12119.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.features import FeatureLayer, input_of
from lightning_peft.adapters.native.mixtures import check_count
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.core.blocks import is_norm
from lightning_peft.errors import ConfigError

__all__ = ["VPT", "VPTConfig"]


@dataclass
class VPTConfig(NativeConfig):
    """Visual prompt tuning: trained tokens in the sequence of each block. Targets are the blocks, in their order.

    Args:
        num_prompts: Prompts per block (deep) or of the model (shallow).
        depth: ``"deep"`` or ``"shallow"``.
        position: How many tokens stay before the prompts: 1 for a class token.
        patch_values: Numbers in a patch, channels times height times width; with the width it sets the spread of the
            start, as if the prompts came out of the layer that embeds patches.
        width: Features of a token; None: those of the first norm or linear layer in the block.

    Paper: M. Jia et al. 2022, arXiv:2203.12119, equations 4 to 8.
    """

    num_prompts: int = field(default=10)
    depth: Literal["deep", "shallow"] = field(default="deep")
    position: int = field(default=1)
    patch_values: int = field(default=3 * 16 * 16)
    width: int | None = field(default=None)

    method: ClassVar[str] = "vpt"
    places: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_prompts", 1)
        check_count(self, "position", 0)
        check_count(self, "patch_values", 1)
        if self.width is not None:
            check_count(self, "width", 1)
        self._check_choice("depth", ("deep", "shallow"))


class VPTLayer(FeatureLayer):
    """A frozen block with prompts that go in with its input and do not come out with its output."""

    prefix = "vpt_"
    trained = ("prompts",)

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return the width of the block."""
        for module in self.get_base_layer().modules():
            if is_norm(module) and isinstance(getattr(module, "weight", None), Tensor):
                return "block", module.weight.numel(), module.weight.numel()  # type: ignore[union-attr, operator]
            if isinstance(module, nn.Linear):
                return "block", module.in_features, module.in_features
        return "block", 0, 0

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if the width of the tokens is not known."""
        if not (config.width or self.in_features):
            raise ConfigError(f"{path} has no norm and no linear layer that tells how wide its tokens are: give width.")

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of the prompts; in the shallow form only the first block has some."""
        return {"prompts": (config.num_prompts, config.width or self.in_features)} if config.puts_in else {}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return uniform values, as Xavier's rule gives them for a layer from patches to tokens."""
        shapes = self.shapes(config)
        if not shapes:
            return {}
        limit = math.sqrt(6.0 / (config.patch_values + shapes["prompts"][1]))
        drawn = torch.rand(shapes["prompts"], generator=generator, dtype=torch.float64)
        return {"prompts": (2 * drawn - 1) * limit}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the longer sequence; return one of the length that comes next.

        Raises:
            ConfigError: If the input is no sequence of tokens of the prompts' width, or comes with a mask.
        """
        names = [name for name in self.active_adapters if name in self.settings]
        if self.disable_adapters or not names:
            return self.base_layer(*args, **kwargs)
        x = input_of(args, kwargs)
        longer = x
        for name in names:
            longer = self._put_in(name, longer)
        if longer is not x:
            others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value is not x]
            if any(x.shape[1] in value.shape[1:] for value in others):
                raise ConfigError(
                    f"{type(self.base_layer).__name__} is called with a mask or positions for {x.shape[1]} tokens, "
                    "which do not fit prompts: visual prompts need a model that lets all tokens see each other."
                )
            args = tuple(longer if value is x else value for value in args)
            kwargs = {key: longer if value is x else value for key, value in kwargs.items()}
        result = self.base_layer(*args, **kwargs)
        tokens = result[0] if isinstance(result, tuple) else result
        for name in reversed(names):
            config: Any = self.settings[name]
            if config.takes_out:
                end = config.position + config.num_prompts
                tokens = torch.cat([tokens[:, : config.position], tokens[:, end:]], dim=1)
        return (tokens, *result[1:]) if isinstance(result, tuple) else tokens

    def _put_in(self, name: str, x: Tensor) -> Tensor:
        config: Any = self.settings[name]
        if not config.puts_in:
            return x
        prompts = self.tensor("prompts", name)
        if x.ndim != 3 or x.shape[2] != prompts.shape[1]:
            raise ConfigError(
                f"{type(self.base_layer).__name__} is called with {tuple(x.shape)}; visual prompts need tokens, (rows, "
                f"tokens, {prompts.shape[1]})."
            )
        prompts = functional.dropout(prompts, config.dropout, self.training).to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : config.position], prompts, x[:, config.position :]], dim=1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ConfigError: Always: tokens are not part of any weight.
        """
        raise ConfigError("Visual prompts cannot be merged: they are tokens, not part of any weight.")


class VPTTuner(NativeTuner):
    """Puts visual prompts into a model: its first block takes them in, each or the last one takes them out."""

    prefix = "vpt_"
    tuner_layer_cls = VPTLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put prompts in, then let the last block take out what the shallow form leaves in."""
        self._first = True
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [m for m in model.modules() if isinstance(m, VPTLayer) and adapter_name in m.settings]
        if layers:
            layers[-1].settings[adapter_name].takes_out = True  # type: ignore[attr-defined]

    def _create_and_replace(self, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(peft_config)
        config.puts_in = self._first or peft_config.depth == "deep"
        config.takes_out = peft_config.depth == "deep"
        self._first = False
        super()._create_and_replace(config, *args, **kwargs)


register("vpt", VPTConfig, VPTTuner)


class VPT(Adapter):
    """Train tokens that are put into the sequence of a vision transformer's blocks.

    ``num_prompts * width`` parameters, times the number of blocks in the deep form. All of a step goes through longer
    sequences: activations grow by ``num_prompts`` tokens, in use too. The model does not start as its base. The head
    is no part of it: keep it outside the target, or name its path in ``always``. Hidden states that transformers
    records on request are those inside the blocks, with prompts.

    Use it for a vision transformer on few examples, or where one frozen model must serve many tasks in one batch.

    Args:
        num_prompts: Prompts per block (deep) or of the model (shallow).
        depth: ``"deep"``: each block has its own; ``"shallow"``: one set, from the first block to the last.
        position: How many tokens stay before the prompts: 1 for a class token, 0 for a model without.
        patch_values: Numbers in a patch, channels times height times width, for the spread of the start.
        dropout: On the prompts, in ``[0, 1)``.
        layers: The blocks, in model order, as a scope of modules.
        target: Path of the submodule that gets the prompts.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: From a step, if a block is called with something else than tokens, or with a mask.

    Example:
        >>> from lightning_peft import VPT
        >>> VPT(num_prompts=50).method
        'vpt'

    Paper:
        M. Jia et al.: Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119, equations 4 to 8.

    Differs from the paper:
        In the shallow form prompts are taken out behind the last block, so that heads which pool over tokens see none
        of them. Swin's windows, and prompts through a projection, are left out.
    """

    def __init__(
        self,
        num_prompts: int = 10,
        depth: Literal["deep", "shallow"] = "deep",
        position: int = 1,
        patch_values: int = 3 * 16 * 16,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.num_prompts, self.depth, self.position = num_prompts, depth, position
        self.patch_values, self.dropout = patch_values, dropout
        config: dict[str, Any] = {
            "num_prompts": num_prompts,
            "depth": depth,
            "position": position,
            "patch_values": patch_values,
            "dropout": dropout,
            "seed": seed,
        }
        super().__init__("vpt", config, target, layers, adapter_name, always, seed)
