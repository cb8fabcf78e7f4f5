"""EmbeddingsAndHead: train the input and output embeddings only.

The lightweight preset of personalised code models (Zlotchevski et al. 2022, arXiv:2208.13928).
"""

from __future__ import annotations

from lightning_peft.core.draw import Draw
from lightning_peft.methods.base import MethodCallback

__all__ = ["EmbeddingsAndHead"]


class EmbeddingsAndHead(MethodCallback):
    """Train the embeddings and the output projection; freeze all blocks and norms.

    Adapts a model to a vocabulary: names and words of one project, one person, one language. Back-propagation passes
    through all blocks, but none of them has weight gradients or optimizer state: about 0.7 of full fine-tuning's FLOPs.

    Use it where words are new and grammar is not, and as the control in every comparison under a shift of vocabulary.

    Args:
        scope: What trains.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Example:
        >>> from lightning_peft import EmbeddingsAndHead
        >>> EmbeddingsAndHead().scope
        ['embeddings', 'head']

    Paper:
        A. Zlotchevski, D. Drain, A. Svyatkovskiy, C. Clement, N. Sundaresan, M. Tufano: Exploring and Evaluating
        Personalized Models for Code Generation, ESEC/FSE 2022, arXiv:2208.13928 (the variant that tunes embeddings
        and output).

    Differs from the paper:
        The paper's model is one encoder-decoder; here the roles are found in any model. Of tied weights there is one,
        which is both. Positions and token types count as embeddings.
    """

    def __init__(self, scope: str | list[str] = ["embeddings", "head"], seed: int = 0) -> None:  # noqa: B006
        super().__init__(scope=scope, always=(), redraw="never", state="keep", seed=seed)

    def select(self, draw: Draw) -> list[str]:
        """Embeddings and head."""
        return list(self.units)
