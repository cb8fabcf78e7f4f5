"""CPT: solved examples stand before the input, and their embeddings move a little from where they are.

Types say what a token of the context is: 1, 5, 9, ... belongs to the template of an input, 2, 6, 10, ... is input, 3,
7, 11, ... belongs to the template of a label, 4, 8, 12, ... is label; each example of the context has the next four.
The offset of each token is projected onto a ball in every forward pass; labels do not move. The loss is that of the
labels of the context and of the batch. arXiv:2410.17222.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.cpt import CPTEmbedding
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, entry_of
from lightning_peft.adapters.injection import Injected
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["CPT", "CPTDriver"]


class ProjectedEmbedding(CPTEmbedding):
    """``peft``'s offsets, projected in place while training; in inference mode the parameter is left alone."""

    @override
    def forward(self, indices: Tensor) -> Tensor:
        """Return the embeddings of the context with their offsets."""
        weight = self.delta_embedding.weight
        with torch.no_grad():
            placed = self.get_projection()
            context = self.embedding(indices)
            if torch.is_inference_mode_enabled():
                return context + functional.embedding(indices, placed)
            weight.copy_(placed)
        return context + self.delta_embedding(indices)


class CPTDriver(Driver):
    """Tell ``peft``'s model what the tokens of each batch are.

    Args:
        handle: ``peft``'s model, which stands in the model's place.
        adapter_name: The adapter.
        type_mask: Key or position of the types in the batch; None: each labelled token of a row is label.
    """

    def __init__(self, handle: PeftModel, adapter_name: str, type_mask: str | int | None) -> None:
        super().__init__(handle, adapter_name)
        self.type_mask = type_mask
        self._types: Tensor | None = None
        self.handle.prompt_encoder[adapter_name].__class__ = ProjectedEmbedding
        self.handle.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        labels = kwargs.get("labels")
        if labels is None:
            if model.training:
                raise ConfigError(
                    "CPT: the loss counts labels of the context too, so that the model computes it. In training_step "
                    "call it with labels=..., and return the loss of its output."
                )
            return None
        types = kwargs.get("input_type_mask", self._types)
        if types is None:
            return None
        if types.shape != labels.shape:
            raise ConfigError(
                f"CPT: types of shape {tuple(types.shape)} for labels of shape {tuple(labels.shape)}: one type per "
                "token is needed."
            )
        return args, {**kwargs, "input_type_mask": types.to(labels.device, copy=True)}  # peft writes into it

    @override
    def batch(self, batch: Any) -> None:
        if self.type_mask is not None:
            self._types = torch.as_tensor(entry_of(batch, self.type_mask, "type_mask"))

    @override
    def finished(self) -> None:
        self._types = None


class CPT(Adapter):
    """Train small offsets to the embeddings of solved examples that stand before each input.

    ``len(context_ids) * width`` values; the tokens of the context's labels stay. Each step is as long as context and
    input together. The model starts as it answers with the examples in its prompt.

    Use it with a handful of examples, where in-context learning works and training more would overfit.

    Args:
        context_ids: Token ids of the context: the solved examples, with their templates.
        context_types: What each of them is: 1 template of an input, 2 input, 3 template of a label, 4 label; for the
            second example 5 to 8, and so on. 0 is left out of everything.
        type_mask: Key or position in the batch of the types of its tokens, 0 to 4, of the labels' shape. None: all
            tokens with a label other than -100 are label.
        epsilon: How far an input token's embedding may move, in units of ``sqrt(width / 2048)``.
        template_epsilon: The same for the templates.
        label_decay: Weight of each example's label over that of the one after it, in ``(0, 1]``; the batch's own has
            weight 1.
        target: Path of the Hugging Face causal language model; ``peft``'s model takes its place there. Its
            ``training_step`` must call it with ``labels`` and return the loss of its output.
        always: What trains beside it although it lies inside the target.
        seed: Not used; the offsets start at zero.

    Raises:
        ConfigError: If an argument is out of its range. From a step, if the model is called without labels, or the
            batch has no types of the labels' shape.

    Example:
        >>> from lightning_peft import CPT
        >>> CPT(context_ids=[5, 17, 3, 9], context_types=[1, 2, 3, 4]).config["num_virtual_tokens"]
        4

    Paper:
        G. Blau, M. Kimhi, Y. Belinkov, A. Bronstein, C. Baskin: Context-aware Prompt Tuning: Advancing In-Context
        Learning with Adversarial Methods, 2024, arXiv:2410.17222.
    """

    def __init__(
        self,
        context_ids: list[int],
        context_types: list[int],
        type_mask: str | int | None = None,
        epsilon: float = 0.1,
        template_epsilon: float = 0.1,
        label_decay: float = 1.0,
        target: str = "model",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        for name, values in (("context_ids", context_ids), ("context_types", context_types)):
            if not values or not all(is_whole(value, 0) for value in values):
                raise ConfigError(f"CPT: {name}={values!r}: a list of whole numbers from 0 on.")
        if len(context_ids) != len(context_types):
            raise ConfigError(f"CPT: {len(context_ids)} context_ids and {len(context_types)} context_types.")
        if not any(value % 4 for value in context_types):
            raise ConfigError(f"CPT: context_types={context_types!r} has no token that may move: none of 1, 2 or 3.")
        if not (epsilon > 0 and template_epsilon > 0 and 0 < label_decay <= 1):
            raise ConfigError("CPT: epsilon and template_epsilon above 0, label_decay in (0, 1].")
        self.context_ids, self.context_types, self.type_mask = list(context_ids), list(context_types), type_mask
        self.epsilon, self.template_epsilon, self.label_decay = epsilon, template_epsilon, label_decay
        config = {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": self.context_ids,
            "cpt_mask": [1] * len(context_ids),
            "cpt_tokens_type_mask": self.context_types,
            "num_virtual_tokens": len(context_ids),
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": label_decay,
            "opt_projection_epsilon": epsilon,
            "opt_projection_format_epsilon": template_epsilon,
        }
        super().__init__("cpt", config, target, always=always, seed=seed)

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return CPTDriver(adapter.handle, adapter.adapter_name, self.type_mask)
