"""LoRA-FA: LoRA with ``A`` frozen at its random start, and the gradient of ``B`` corrected for it.

With ``W = W0 + s B A`` and the gradient ``G`` of ``W``, that of ``B`` is ``s G A^T``. The step of ``B`` that comes
closest to a step of ``W`` along ``G``, in the Frobenius norm, is ``(1 / s^2) (s G A^T) (A A^T)^-1``: it moves ``W``
along ``G`` projected onto the rows of ``A``. L. Zhang et al., arXiv:2308.03303.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, lora_layers
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.presets import lora_config
from lightning_peft.core.masters import original
from lightning_peft.core.sharded import local, whole
from lightning_peft.errors import ConfigError, UnsupportedStrategy

__all__ = ["LoRAFA", "LoRAFADriver", "correction"]


@torch.no_grad()
def correction(a: Tensor, scale: float) -> Tensor:
    """Return the matrix (r, r) by which the gradient of ``B`` is multiplied: ``(A A^T)^-1 / scale^2``.

    Args:
        a: ``A``, (r, in); further dimensions, of a convolution, are taken as inputs.
        scale: ``s``, the factor on ``B A``.

    Returns:
        The pseudo-inverse where ``A`` has more rows than columns, in the dtype of ``A``, computed in float64.
    """
    rows = a.flatten(1).double()
    return (torch.linalg.pinv(rows @ rows.T, hermitian=True) / scale**2).to(a.dtype)


class LoRAFADriver(Driver):
    """Freeze ``A`` and correct the gradient of ``B`` before each step of whatever optimizer holds it.

    Moments of Adam are then of corrected gradients, as in the authors' optimizer.
    """

    def __init__(self, adapter: Injected) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self._corrections: list[tuple[nn.Parameter, Tensor]] = []
        if any(f".lora_embedding_A.{self.adapter_name}" in name for name in adapter.names):
            raise ConfigError(
                "LoRAFA freezes A, which of an embedding's adapter starts at zero: it would learn nothing. Leave "
                "embeddings out of layers."
            )

    @override
    def trains(self, names: frozenset[str]) -> frozenset[str]:
        """All but ``A``."""
        return frozenset(name for name in names if f".lora_A.{self.adapter_name}." not in name)

    @override
    def started(self) -> None:
        """Invert what ``A`` is now; it does not change."""
        if self._corrections:
            return
        for name, layer in lora_layers(self.handle, self.adapter_name).items():
            a, b = layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name].weight
            matrix = correction(whole(a), layer.scaling[self.adapter_name])
            if local(b).shape[1] != len(matrix):
                raise UnsupportedStrategy(
                    f"LoRAFA corrects gradients over the ranks of B, of which {name} has {local(b).shape[1]} of "
                    f"{len(matrix)} here: grouped convolutions, and weights that are cut along ranks, are not "
                    "supported."
                )
            self._corrections.append((b, matrix))

    @override
    def finished(self) -> None:
        self._corrections = []

    @override
    @torch.no_grad()
    def stepping(self, optimizer: torch.optim.Optimizer) -> None:
        """Multiply the gradients by the corrections, in place."""
        held = {id(original(parameter)) for group in optimizer.param_groups for parameter in group["params"]}
        for parameter, matrix in self._corrections:
            if parameter.grad is not None and id(parameter) in held:
                gradient = local(parameter.grad)
                rows = gradient.flatten(1)
                gradient.copy_((rows.to(matrix.dtype) @ matrix).view_as(gradient))


class LoRAFA(Adapter):
    """Train only the second matrix ``B`` of LoRA; ``A`` stays at its random start.

    ``rank * out`` parameters per layer, about half of LoRA's optimizer state, and nothing of the layer's input is kept
    in memory for the backward pass but ``rank`` numbers per token. Gradients are corrected, by a matrix of
    ``rank x rank`` per layer, so that each step comes closest to one of full fine-tuning.

    Use it where activations fill the memory.

    Args:
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope; no embeddings.
        init: How ``A`` starts: ``"default"``, ``"gaussian"``, ``"orthogonal"``.
        rank_stabilized: Scale by ``alpha / sqrt(rank)`` (rsLoRA).
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: From the fit, if ``layers`` holds embeddings.

    Example:
        >>> from lightning_peft import LoRAFA
        >>> LoRAFA(rank=4).config["lora_alpha"]
        8

    Paper:
        L. Zhang et al.: LoRA-FA: Efficient and Effective Low Rank Representation Fine-tuning, 2023, arXiv:2308.03303,
        second version.

    Differs from the paper:
        The correction is applied to the gradients of any optimizer, before the Trainer clips them, and its inverse is
        exact: ``peft``'s optimizer adds ``1e-8`` to the diagonal and multiplies in bfloat16.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        init: str = "default",
        rank_stabilized: bool = False,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.alpha, self.dropout, self.init = rank, alpha, dropout, init
        self.rank_stabilized = rank_stabilized
        config = lora_config(rank, alpha, dropout, init) | {"use_rslora": rank_stabilized}
        super().__init__("lora", config, target, layers, adapter_name, always, seed)

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return LoRAFADriver(adapter)
