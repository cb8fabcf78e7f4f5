"""Typed shortcuts: adapters that start from a pass over training data (see ``calibration.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning_peft.adapters.native  # noqa: F401  (registers LoRA-SB)
from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.presets import lora_config
from lightning_peft.errors import ConfigError

__all__ = ["EVA", "CorDA", "LoRAGA", "LoRASB"]


class EVA(Adapter):
    """Start LoRA's first matrix from what the layers' inputs vary in most, and give ranks to where they vary more.

    LoRA's cost, after a forward pass over some batches in evaluation mode until the directions hold still. The model
    starts exactly as its base, which does not change; a checkpoint holds the ranks, and no batch is needed to go on.

    Use it in place of LoRA: the start costs little and the parameters are as many, but where they count.

    Args:
        rank: Mean rank of the layers.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        rho: A layer may get up to ``rho * rank`` ranks, at least 1; 1 leaves all at ``rank``.
        tau: Cosine similarity, in ``[0, 1]``, between a direction and itself one batch before, at which it counts as
            found.
        whiten: Divide directions by the root of their singular values, which may help on images.
        dropout: On the adapters' input, in ``[0, 1)``.
        num_batches: Batches of the training data at most, over and over; each must hold ``2 * rho * rank`` inputs.
        layers: Which layers get one, as a scope; those without inputs that vary lose it.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the draw of the batches.

    Raises:
        ConfigError: If an option is out of range. From the fit: no training loader over a data set with a length,
            batches with too few inputs, directions that do not settle, a layer that is not used.

    Example:
        >>> from lightning_peft import EVA
        >>> EVA(rank=4, rho=1.5).config["init_lora_weights"]
        'eva'

    Paper:
        F. Paischer et al.: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024,
        arXiv:2410.07170.

    Differs from the paper:
        ``peft``'s implementation, with the inputs' mean taken off. Positions of padding, and of no label, do not count.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        rho: float = 2.0,
        tau: float = 0.99,
        whiten: bool = False,
        dropout: float = 0.0,
        num_batches: int = 32,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.rho, self.tau, self.whiten, self.num_batches = rho, tau, whiten, num_batches
        options = {"eva_config": {"rho": rho, "tau": tau, "whiten": whiten}}
        _check_batches("EVA", num_batches)
        super().__init__(
            "lora",
            lora_config(rank, alpha, dropout, "eva") | options,
            target,
            layers,
            adapter_name,
            always,
            seed,
            num_batches,
        )


class CorDA(Adapter):
    """Train the components of each weight that matter most, or least, to what its inputs look like.

    A weight is decomposed under the covariance of its inputs, from a forward pass over some batches in evaluation
    mode; one decomposition per layer and, meanwhile, one square matrix of the input's width. The product the adapter
    starts with is subtracted from the base, so that the model starts as it was up to rounding. A checkpoint holds the
    factors at the start, and no batch is needed to go on.

    Use it with ``mode="ipm"`` to converge faster than LoRA or PiSSA on data like these; with ``mode="kpm"``, over data
    that stand for what the base knows, to forget less.

    Args:
        rank: Number of components.
        mode: ``"ipm"`` (instruction-previewed) trains the largest components, ``"kpm"`` (knowledge-preserved) the
            smallest.
        dropout: On the adapters' input, in ``[0, 1)``.
        num_batches: Batches of the training data at most; together they should hold many times the layers' width.
        layers: Which linear layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the draw of the batches.

    Raises:
        ConfigError: If an option is out of range. From the fit: no training loader over a data set with a length, a
            layer that is quantised, tied, not linear or not used, a rank above a layer's smaller side.

    Example:
        >>> from lightning_peft import CorDA
        >>> CorDA(rank=4, mode="kpm").config["corda_config"]
        {'corda_method': 'kpm'}

    Paper:
        Y. Yang et al.: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
        Parameter-Efficient Fine-tuning, NeurIPS 2024, arXiv:2406.05223.

    Differs from the paper:
        ``peft``'s implementation, with inputs scaled by their largest value; in both modes the batches are those of
        the training loader.
    """

    def __init__(
        self,
        rank: int = 8,
        mode: Literal["ipm", "kpm"] = "ipm",
        dropout: float = 0.0,
        num_batches: int = 64,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if mode not in ("ipm", "kpm"):
            raise ConfigError(f"CorDA: mode={mode!r}; it is 'ipm' or 'kpm'.")
        _check_batches("CorDA", num_batches)
        self.rank, self.mode, self.dropout, self.num_batches = rank, mode, dropout, num_batches
        super().__init__(
            "lora",
            lora_config(rank, rank, dropout, "corda") | {"corda_config": {"corda_method": mode}},
            target,
            layers,
            adapter_name,
            always,
            seed,
            num_batches,
        )


class LoRAGA(Adapter):
    """Start LoRA from singular vectors of the gradient, so that its first steps go where those of the weight would.

    LoRA's cost, after some batches forward and backward, with the gradients of the adapted weights in memory. The
    product the adapter starts with is subtracted from the base, so that the model starts as it was up to rounding. A
    checkpoint holds the factors at the start, and no batch is needed to go on.

    Use it to converge faster than LoRA, where gradients of the adapted weights fit into memory once.

    Args:
        rank: Of the update; at most half of a layer's smaller side.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        direction: Which of the ``2 * rank`` largest directions go where: ``"ArB2r"`` the first half to A, the second to
            B; ``"A2rBr"`` the other way round; ``"ArBr"`` in turns; ``"random"``.
        scale: Of the start: ``"stable"`` by ``gamma``, ``"weight_svd"`` as large as the weight, ``"gd_scale"`` by
            ``alpha / rank``, ``"unit"`` none.
        gamma: Of the stable scale, above 0: the larger, the smaller the start.
        dropout: On the adapters' input, in ``[0, 1)``.
        num_batches: Batches of the training data at most.
        layers: Which linear layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the draw of the batches, of dropout in the pass and of the decomposition.

    Raises:
        ConfigError: If an option is out of range. From the fit: no training loader over a data set with a length, a
            layer that is quantised, tied, not linear or not used, a rank too large for a layer.

    Example:
        >>> from lightning_peft import LoRAGA
        >>> LoRAGA(rank=4).config["init_lora_weights"]
        'lora_ga'

    Paper:
        S. Wang, L. Yu, J. Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, NeurIPS 2024, arXiv:2407.05000.

    Differs from the paper:
        ``peft``'s implementation: B keeps the singular values, and the stable scale is applied to B alone. The pass
        runs in the mode the module trains in (frozen BatchNorm stays frozen).
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r",
        scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable",
        gamma: int = 16,
        dropout: float = 0.0,
        num_batches: int = 32,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("direction", direction, ("ArBr", "A2rBr", "ArB2r", "random")),
            ("scale", scale, ("stable", "weight_svd", "gd_scale", "unit")),
        ):
            if value not in known:
                raise ConfigError(f"LoRAGA: {name}={value!r}; it is one of {', '.join(map(repr, known))}.")
        if not gamma > 0:
            raise ConfigError(f"LoRAGA: gamma={gamma!r}; it is above 0.")
        _check_batches("LoRAGA", num_batches)
        self.rank, self.alpha, self.dropout, self.num_batches = rank, alpha, dropout, num_batches
        self.direction, self.scale, self.gamma = direction, scale, gamma
        options = {"lora_ga_config": {"direction": direction, "scale": scale, "stable_gamma": gamma}}
        super().__init__(
            "lora",
            lora_config(rank, alpha, dropout, "lora_ga") | options,
            target,
            layers,
            adapter_name,
            always,
            seed,
            num_batches,
        )


class LoRASB(Adapter):
    """Train a small square matrix between the singular vectors of the first step that full fine-tuning would take.

    ``rank²`` parameters per layer, like LoRA-XS; optimizer state and gradients are next to nothing. Before training,
    some batches run forward and backward, with the gradients of the adapted weights in float32 in memory. Training
    starts one step ahead of the base, which does not change; merged into it, it costs nothing in use.

    Use it when LoRA-XS is small enough, and not good enough.

    Args:
        rank: Of the update, and width of the matrix.
        learning_rate: Of the first step, above 0: the one you train with.
        first_step: ``"adamw"`` takes the sign of the gradient, ``"sgd"`` the gradient.
        dropout: On the adapters' input, in ``[0, 1)``.
        num_batches: Batches of the training data at most; the paper takes a thousandth of the data. 0: the adapter
            waits for :func:`~lightning_peft.calibrate_lora_sb`.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the draw of the batches, and of dropout in the pass.

    Raises:
        ConfigError: If an option is out of range. From the fit: no training loader over a data set with a length, or a
            layer that is not used.

    Example:
        >>> from lightning_peft import LoRASB
        >>> LoRASB(rank=4).method
        'lora_sb'

    Paper:
        K. Ponkshe et al.: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
        Fine-Tuning, 2024, arXiv:2411.19557, algorithm 1.

    Differs from the paper:
        Gradients are averaged over batches, each with the mean loss of its batch, instead of summed over samples.
    """

    def __init__(
        self,
        rank: int = 16,
        learning_rate: float = 1e-4,
        first_step: Literal["adamw", "sgd"] = "adamw",
        dropout: float = 0.0,
        num_batches: int = 32,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        _check_batches("LoRASB", num_batches, least=0)
        self.rank, self.learning_rate, self.first_step = rank, learning_rate, first_step
        self.dropout, self.num_batches = dropout, num_batches
        config = {"r": rank, "learning_rate": learning_rate, "first_step": first_step, "dropout": dropout}
        super().__init__("lora_sb", config, target, layers, adapter_name, always, seed, num_batches)


def _check_batches(name: str, num_batches: int, least: int = 1) -> None:
    if num_batches < least:
        raise ConfigError(f"{name}: num_batches={num_batches!r}; at least {least}.")
