"""Typed shortcuts: native adapters as callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning_peft.adapters.native  # noqa: F401  (registers the methods)
from lightning_peft.adapters.adapter import Adapter

__all__ = ["IntTune", "LoLDU", "LoRAXS", "NLoRA", "SLoRA"]


class LoRAXS(Adapter):
    """Train a small square matrix between frozen leading singular vectors of each weight.

    ``rank²`` parameters per layer, whatever the layer's size; optimizer state and gradients are next to nothing. One
    singular value decomposition per layer at the start; merged into the base it costs nothing in use.

    Use it when many adapters are kept or sent, and LoRA at rank 1 is still too large.

    Args:
        rank: Of the update, and width of the matrix.
        alpha: The update is scaled by ``alpha / rank``; None: not scaled.
        init_std: Standard deviation of the matrix at the start; 0 starts exactly at the base.
        svd: ``"exact"``, or ``"randomized"``, faster on large layers.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import LoRAXS
        >>> LoRAXS(rank=4).method
        'lora_xs'

    Paper:
        K. Balazy et al.: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, 2024,
        arXiv:2405.17604.

    Differs from the paper:
        Signs of singular vectors are fixed, so that a seed gives one initialisation.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        init_std: float = 1e-5,
        svd: Literal["exact", "randomized"] = "exact",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "alpha": alpha, "init_std": init_std, "svd": svd, "dropout": dropout}
        super().__init__("lora_xs", {**config, "seed": seed}, target, layers, adapter_name, always, seed)
        self.rank, self.alpha, self.init_std, self.svd, self.dropout = rank, alpha, init_std, svd, dropout


class SLoRA(Adapter):
    """Train LoRA's two matrices and a small square one between them.

    ``rank * (in + out) + rank²`` parameters per layer: LoRA's cost and little more; merged into the base it costs
    nothing in use. The model starts exactly as its base.

    Use it instead of LoRA where that converges slowly.

    Args:
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``; None: not scaled.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import SLoRA
        >>> SLoRA(rank=4).method
        'slora'

    Paper:
        C. Guo, Y. Chang, Y. Wu: NLoRA: Nystroem-Initiated Low-Rank Adaptation for Large Language Models, EMNLP
        Findings 2025, arXiv:2502.14482.

    Differs from the paper:
        Not knowingly: A and the matrix between start uniform, B at zero, as in the authors' code.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "alpha": alpha, "dropout": dropout, "seed": seed}
        super().__init__("slora", config, target, layers, adapter_name, always, seed)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout


class NLoRA(Adapter):
    """Train three factors that start as blocks of the weight itself.

    ``rank * (in + out) + rank²`` parameters per layer, whose start is kept as well: twice LoRA's memory for factors. No
    decomposition, and the model starts exactly as its base; merged into it, it costs nothing in use.

    Use it like PiSSA, for faster convergence than LoRA's, without a singular value decomposition.

    Args:
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``; None: not scaled.
        core: The matrix between starts as ``"block"``, the upper left block of the weight, or ``"pinv"``, its
            pseudo-inverse, which makes the product the Nystroem approximation.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Nothing is drawn.

    Example:
        >>> from lightning_peft import NLoRA
        >>> NLoRA(rank=4).method
        'nlora'

    Paper:
        C. Guo, Y. Chang, Y. Wu: NLoRA: Nystroem-Initiated Low-Rank Adaptation for Large Language Models, EMNLP
        Findings 2025, arXiv:2502.14482.

    Differs from the paper:
        The product at the start is subtracted, so that training starts from the base; the authors' code adds it.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        core: Literal["block", "pinv"] = "block",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "alpha": alpha, "core": core, "dropout": dropout, "seed": seed}
        super().__init__("nlora", config, target, layers, adapter_name, always, seed)
        self.rank, self.alpha, self.core, self.dropout = rank, alpha, core, dropout


class IntTune(Adapter):
    """Train a small square matrix between frozen blocks of the weight itself.

    ``rank²`` parameters per layer, like LoRA-XS; optimizer state and gradients are next to nothing. No decomposition,
    and the model starts exactly as its base; merged into it, it costs nothing in use.

    Use it for the fewest parameters at no cost at the start.

    Args:
        rank: Of the update, and width of the matrix.
        alpha: The update is scaled by ``alpha / rank``; None: not scaled.
        core: The matrix starts as ``"block"``, the upper left block of the weight, or ``"pinv"``, its pseudo-inverse.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Nothing is drawn.

    Example:
        >>> from lightning_peft import IntTune
        >>> IntTune(rank=4).method
        'inttune'

    Paper:
        C. Guo, Y. Chang, Y. Wu: NLoRA: Nystroem-Initiated Low-Rank Adaptation for Large Language Models, EMNLP
        Findings 2025, arXiv:2502.14482.

    Differs from the paper:
        The product at the start is subtracted, so that training starts from the base; the authors' code adds it.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        core: Literal["block", "pinv"] = "block",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "alpha": alpha, "core": core, "dropout": dropout, "seed": seed}
        super().__init__("inttune", config, target, layers, adapter_name, always, seed)
        self.rank, self.alpha, self.core, self.dropout = rank, alpha, core, dropout


class LoLDU(Adapter):
    """Train the diagonal of a low-rank lower-diagonal-upper factorisation of each weight.

    ``rank + 1`` parameters per layer; optimizer state and gradients are next to nothing. One LU decomposition per layer
    at the start, and the model starts exactly as its base; merged into it, it costs nothing in use.

    Use it when a thousand adapters must fit where one of LoRA would. It rescales directions that the weight has and
    turns none: raise the rank, up to the layer's width, before giving it up.

    Args:
        rank: How many entries of the diagonal train.
        alpha: The scalar in front starts as ``alpha / rank``; None: 1.
        init: Where the diagonal starts: ``"ldu"`` at the weight's own; ``"uniform"``, ``"normal"`` and ``"constant"``
            by its mean and spread; ``"zeros"``.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import LoLDU
        >>> LoLDU(rank=64).method
        'loldu'

    Paper:
        Y. Shi et al.: LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
        Fine-Tuning, 2024, arXiv:2410.13618.

    Differs from the paper:
        The residual weight is not stored: the product at the start is subtracted beside an untouched base.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        init: Literal["ldu", "uniform", "normal", "constant", "zeros"] = "ldu",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "alpha": alpha, "init": init, "dropout": dropout, "seed": seed}
        super().__init__("loldu", config, target, layers, adapter_name, always, seed)
        self.rank, self.alpha, self.init, self.dropout = rank, alpha, init, dropout
