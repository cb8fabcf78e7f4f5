"""Typed shortcuts for the adapters used most; everything else goes through :class:`~lightning_peft.Adapter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_peft.adapters.adapter import Adapter

__all__ = ["IA3", "OFT", "AdaLoRA", "DoRA", "KaSA", "LoRA", "MiSS", "PiSSA", "PrefixTuning", "PromptTuning", "VeRA"]


class LoRA(Adapter):
    """Train a low-rank matrix beside each linear layer of the blocks.

    ``rank * (in + out)`` parameters per layer; merged into the base it costs nothing in use.

    Use it first, where gradients and optimizer states of the whole model do not fit.

    Args:
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        init: How it starts: ``"default"`` (zero update), ``"gaussian"``, ``"orthogonal"``, ``"olora"``.
        rank_stabilized: Scale by ``alpha / sqrt(rank)`` (rsLoRA).
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import LoRA
        >>> LoRA(rank=4, layers=["*.q_proj", "*.v_proj"]).config["lora_alpha"]
        8

    Paper:
        E. J. Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685.
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
        super().__init__(
            "lora",
            lora_config(rank, alpha, dropout, init) | {"use_rslora": rank_stabilized},
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class DoRA(Adapter):
    """Train the direction of each weight by LoRA, and the length of its columns beside it.

    Use it for a better fit than LoRA of the same rank, at a step that costs more: each weight is normalised anew.

    Args:
        rank: Of the update.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Paper:
        S.-Y. Liu et al.: DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        super().__init__(
            "lora",
            lora_config(rank, alpha, dropout, "default") | {"use_dora": True},
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class PiSSA(Adapter):
    """Train the largest singular components of each weight; the rest is the frozen base.

    Use it to converge faster than LoRA. It is exported as a LoRA of twice the rank over the original base.

    Args:
        rank: Number of components.
        iterations: Of the fast randomised decomposition; None takes the exact one.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the randomised decomposition.

    Paper:
        F. Meng, Z. Wang, M. Zhang: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
        Models, NeurIPS 2024, arXiv:2404.02948.
    """

    def __init__(
        self,
        rank: int = 8,
        iterations: int | None = None,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.iterations, self.dropout = rank, iterations, dropout
        super().__init__(
            "lora",
            lora_config(rank, rank, dropout, "pissa" if iterations is None else f"pissa_niter_{iterations}"),
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class KaSA(Adapter):
    """Drop the smallest singular components of each weight, and train a low-rank update in the form of an SVD.

    ``rank * (in + out + 1)`` parameters per layer, and one decomposition of each layer at the start, which changes the
    base: the run starts beside the pretrained model. Two regularisers keep the form; they are added to the loss.

    Use it where the base holds much that the task does not need. Export writes an ordinary LoRA over the original base.

    Args:
        rank: Of the update, and number of components dropped.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        beta: Weight of the squared singular values of the update.
        gamma: Weight of its factors' distance from orthogonal ones.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Paper:
        F. Wang et al.: KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, ICLR 2025,
        arXiv:2412.06071, equations 9 to 12.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        beta: float = 1e-4,
        gamma: float = 1e-3,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.alpha, self.beta, self.gamma, self.dropout = rank, alpha, beta, gamma, dropout
        config = lora_config(rank, alpha, dropout, "default") | {"kasa_config": {"beta": beta, "gamma": gamma}}
        super().__init__("lora", config, target, layers, adapter_name, always, seed)


class AdaLoRA(Adapter):
    """Train updates in the form of singular values and vectors, and move ranks to the layers that need them.

    Use it when layers differ in how much they have to learn and the total number of ranks is limited.

    Args:
        total_steps: Optimizer steps of the whole run; the schedule of ranks is laid over them.
        initial_rank: Of each layer at the start.
        target_rank: Mean rank at the end.
        warmup_steps: Steps before ranks are taken away.
        final_steps: Steps at the end without further change.
        period_steps: Steps between two allocations.
        alpha: Scale of the update; None: twice the target rank.
        orthogonality: Weight of the regulariser that keeps the vectors near orthogonal.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Paper:
        Q. Zhang et al.: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023,
        arXiv:2303.10512.
    """

    def __init__(
        self,
        total_steps: int,
        initial_rank: int = 12,
        target_rank: int = 8,
        warmup_steps: int = 0,
        final_steps: int = 0,
        period_steps: int = 1,
        alpha: float | None = None,
        orthogonality: float = 0.5,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.total_steps, self.initial_rank, self.target_rank = total_steps, initial_rank, target_rank
        self.warmup_steps, self.final_steps, self.period_steps = warmup_steps, final_steps, period_steps
        self.alpha, self.orthogonality = alpha, orthogonality
        super().__init__(
            "adalora",
            {
                "total_step": total_steps,
                "init_r": initial_rank,
                "target_r": target_rank,
                "tinit": warmup_steps,
                "tfinal": final_steps,
                "deltaT": period_steps,
                "lora_alpha": 2 * target_rank if alpha is None else alpha,
                "orth_reg_weight": orthogonality,
            },
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class IA3(Adapter):
    """Train one factor per output of keys and values, and per input of the feed-forward down projection.

    Use it for a handful of examples, or for very many tasks: a few numbers per layer.

    Args:
        target_modules: Layers, as ``peft`` takes them; None: what ``peft`` knows of the architecture.
        feedforward_modules: Those of them that are scaled at their input.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Not used; the factors start at 1.

    Paper:
        H. Liu et al.: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
        NeurIPS 2022, arXiv:2205.05638.
    """

    def __init__(
        self,
        target_modules: list[str] | None = None,
        feedforward_modules: list[str] | None = None,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.target_modules, self.feedforward_modules = target_modules, feedforward_modules
        super().__init__(
            "ia3",
            {"target_modules": target_modules, "feedforward_modules": feedforward_modules},
            target,
            None,
            adapter_name,
            always,
            seed,
        )


class VeRA(Adapter):
    """Train two vectors per layer around one pair of random matrices that all layers share.

    Use it when even LoRA's files are too many or too large: ``rank + out`` numbers per layer.

    Args:
        rank: Of the shared matrices.
        layers: Which layers get one, as a scope; all of one shape where the shared matrices are cut.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the shared matrices.

    Paper:
        D. J. Kopiczko, T. Blankevoort, Y. M. Asano: VeRA: Vector-based Random Matrix Adaptation, ICLR 2024,
        arXiv:2310.11454.
    """

    def __init__(
        self,
        rank: int = 256,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank = rank
        super().__init__(
            "vera",
            {"r": rank, "projection_prng_key": seed},
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class OFT(Adapter):
    """Rotate the outputs of each layer's weight by small orthogonal blocks.

    Use it to keep what the base knows: angles between the neurons of a layer do not change.

    Args:
        block_size: Width of a block; must divide the layers' input width.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Not used; the rotations start at the identity.

    Paper:
        Z. Qiu et al.: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, NeurIPS 2023, arXiv:2306.07280.
    """

    def __init__(
        self,
        block_size: int = 32,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.block_size = block_size
        super().__init__(
            "oft",
            {"oft_block_size": block_size},
            target,
            layers,
            adapter_name,
            always,
            seed,
        )


class MiSS(Adapter):
    """Train one small matrix per layer, shared along the input by blocks (earlier called Bone).

    Use it as LoRA, with fewer parameters at equal rank and one matrix product less.

    Args:
        rank: Number of shards of the input.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Not used; the matrix starts at zero.

    Paper:
        J. Kang, Q. Yin: MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure, 2024,
        arXiv:2409.15371.
    """

    def __init__(
        self,
        rank: int = 64,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank = rank
        super().__init__("miss", {"r": rank}, target, layers, adapter_name, always, seed)


class PromptTuning(Adapter):
    """Train vectors that stand before the input's embeddings of a Hugging Face model.

    Use it for large models and many tasks: a few thousand numbers per task, and none inside the model.

    Args:
        num_virtual_tokens: How many.
        task_type: Of the model, as ``peft`` calls it (``"CAUSAL_LM"``, ``"SEQ_CLS"``, ...).
        target: Path of the Hugging Face model; ``peft``'s model takes its place there.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Paper:
        B. Lester, R. Al-Rfou, N. Constant: The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021,
        arXiv:2104.08691.
    """

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        task_type: str = "CAUSAL_LM",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.num_virtual_tokens, self.task_type = num_virtual_tokens, task_type
        super().__init__(
            "prompt_tuning",
            {"num_virtual_tokens": num_virtual_tokens, "task_type": task_type},
            target,
            None,
            adapter_name,
            always,
            seed,
        )


class PrefixTuning(Adapter):
    """Train keys and values that stand before those of the input, in each layer of a Hugging Face model.

    Use it as prompt tuning, for smaller models and harder tasks.

    Args:
        num_virtual_tokens: How many.
        task_type: Of the model, as ``peft`` calls it (``"CAUSAL_LM"``, ``"SEQ_CLS"``, ...).
        target: Path of the Hugging Face model; ``peft``'s model takes its place there.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Paper:
        X. L. Li, P. Liang: Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021, arXiv:2101.00190.
    """

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        task_type: str = "CAUSAL_LM",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.num_virtual_tokens, self.task_type = num_virtual_tokens, task_type
        super().__init__(
            "prefix_tuning",
            {"num_virtual_tokens": num_virtual_tokens, "task_type": task_type},
            target,
            None,
            adapter_name,
            always,
            seed,
        )


def lora_config(rank: int, alpha: float | None, dropout: float, init: str) -> dict[str, Any]:
    """Return what ``peft``'s ``LoraConfig`` takes."""
    return {
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": dropout,
        "init_lora_weights": True if init == "default" else init,
    }
