"""BitFit: train the biases that the model has, and nothing else but the head.

Zaken et al. 2022, arXiv:2106.10199.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.core.draw import Draw
from lightning_peft.methods.base import MethodCallback

__all__ = ["BitFit"]


class BitFit(MethodCallback):
    """Train the bias vectors and the task head (bias-term fine-tuning).

    About 0.1 % of a BERT's parameters. No weight gradient of a matrix is computed and no input of a linear layer is
    saved for it, so that a step costs two thirds of full fine-tuning's FLOPs; back-propagation passes through all.

    Use it with encoders on small data. Models without biases (Llama, T5) have nothing to train: that is an error.

    Args:
        scope: Which biases: the role, or patterns such as ``"*.query.bias"`` for the paper's smaller variant.
        always: What trains beside them. A new classifier must.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ScopeError: From the fit, if the model has no bias.

    Example:
        >>> from lightning_peft import BitFit
        >>> BitFit().scope
        'biases'

    Paper:
        E. Ben Zaken, S. Ravfogel, Y. Goldberg: BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
        Masked Language-models, ACL 2022, arXiv:2106.10199.

    Differs from the paper:
        Every parameter called a bias counts, in any model: those of norms, as in the paper, and also those of
        convolutions, state-space mixers and recurrent layers.
    """

    def __init__(self, scope: str | list[str] = "biases", always: Sequence[str] = ("head",), seed: int = 0) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)

    def select(self, draw: Draw) -> list[str]:
        """All biases."""
        return list(self.units)
