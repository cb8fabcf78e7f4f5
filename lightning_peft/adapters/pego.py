"""PEGO: a group of LoRAs per layer, kept orthogonal to the pretrained weight and to each other.

With updates ``D_i = B_i A_i`` beside ``W0`` in each layer the loss gains ``weight`` times the sum over layers of

    sum_i |W0 D_i^T|_1  +  sum_{i<j} |D_i D_j^T|_1

(``|.|_1``: sum of the entries' absolute values): the first keeps what the model knows, the second makes the members of
the group learn different things. J. Hu et al., arXiv:2407.15085.

A group of LoRAs of rank ``r``, summed, is one LoRA whose rank is that of all of them: rows of ``A`` and columns of
``B`` number ``i r`` to ``(i + 1) r`` are member ``i``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, lora_layers
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.presets import lora_config
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_number, is_whole

__all__ = ["PEGO", "PEGODriver", "orthogonality"]


def orthogonality(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, group_size: int) -> Tensor:
    """Return the regulariser of one layer, a number; no update is ever made whole.

    Args:
        w_OI: Pretrained weight.
        a_RI: ``A`` of all members of the group, one below the other.
        b_OR: ``B`` of all members of the group, side by side.
        group_size: Members.
    """
    members = list(zip(a_RI.chunk(group_size, 0), b_OR.chunk(group_size, 1), strict=True))
    kept = [((w_OI @ a.T) @ b.T).abs().sum() for a, b in members]
    different = [
        ((b_first @ (a_first @ a.T)) @ b.T).abs().sum()
        for (a_first, b_first), (a, b) in itertools.combinations(members, 2)
    ]
    return torch.stack([*kept, *different]).sum()


class PEGODriver(Driver):
    """Add the regulariser to the training loss, in float32; its activations are computed again in the backward pass.

    Args:
        adapter: The adapter.
        weight: Of the regulariser.
        group_size: Members of the group.
    """

    adds_loss = True
    sees_whole_parameters = True

    def __init__(self, adapter: Injected, weight: float, group_size: int) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self.weight, self.group_size = weight, group_size
        self._layers = lora_layers(self.handle, self.adapter_name)
        for path, layer in self._layers.items():
            if is_quantized(layer.get_base_layer().weight):
                raise ConfigError(
                    f"PEGO compares the update of {path} with its weight, which is quantised. Leave the base as it is."
                )
            if layer.lora_B[self.adapter_name].weight.shape[1] != layer.r[self.adapter_name]:
                raise ConfigError(f"PEGO: {path} is a grouped convolution, which has no one update. Leave it out.")

    @override
    def loss(self) -> Tensor:
        """The sum over layers, times the weight."""
        return self.weight * torch.stack([self._of(layer) for layer in self._layers.values()]).sum()

    def _of(self, layer: Any) -> Tensor:
        base = layer.get_base_layer().weight
        a, b = layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name].weight

        def compute(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            with torch.autocast(w.device.type, enabled=False):
                w_OI = w.T if getattr(layer, "fan_in_fan_out", False) else w.flatten(1)
                scaled = layer.scaling[self.adapter_name] * b.flatten(1).float()
                return orthogonality(w_OI.float(), a.flatten(1).float(), scaled, self.group_size)

        value = checkpoint(compute, base, a, b, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(value, Tensor)
        return value


class PEGO(Adapter):
    """Train a group of small LoRAs in each layer, orthogonal to the pretrained weight and to each other.

    ``group_size * rank * (in + out)`` parameters per layer, as one LoRA of their joint rank; merged into the base it
    costs nothing in use. A step costs more by ``group_size`` products of ``out x out`` and ``out x rank`` per layer.

    Use it where the model is used on data that differ from those it is tuned on.

    Args:
        rank: Of each LoRA of the group.
        group_size: LoRAs per layer.
        weight: Of the regulariser, 0 or more. It is a sum over all entries: smaller for larger models.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get a group, as a scope; linear layers and convolutions. The paper has queries and values.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If an argument is out of its range. From the fit, if the base is quantised, or with manual
            optimisation.
        UnsupportedStrategy: From the fit, if the strategy shards parameters.

    Example:
        >>> from lightning_peft import PEGO
        >>> PEGO(rank=4, group_size=2).config["r"]
        8

    Paper:
        J. Hu, J. Zhang, L. Qi, Y. Shi, Y. Gao: Learn to Preserve and Diversify: Parameter-Efficient Group with
        Orthogonal Regularization for Domain Generalization, ECCV 2024, arXiv:2407.15085.
    """

    def __init__(
        self,
        rank: int = 4,
        group_size: int = 4,
        weight: float = 1e-3,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not is_whole(rank, 1) or not is_whole(group_size, 1) or not is_number(weight) or weight < 0:
            raise ConfigError(
                f"PEGO: rank={rank!r} and group_size={group_size!r} are whole numbers from 1 on, weight={weight!r} is "
                "a number from 0 on."
            )
        self.rank, self.group_size, self.weight, self.dropout = rank, group_size, weight, dropout
        joint = rank * group_size
        super().__init__(
            "lora", lora_config(joint, joint, dropout, "default"), target, layers, adapter_name, always, seed
        )

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return PEGODriver(adapter, self.weight, self.group_size)
