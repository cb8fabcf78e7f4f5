"""DePT: a short soft prompt, and a low-rank update of the word embeddings, in the place of a long soft prompt.

``[P; E + (alpha / sqrt(r)) · A B]`` goes into the transformer instead of the word embeddings E (tokens, d) of its
input: P (m, d) are m trained tokens, and the rows of A (max_length, r) belong to positions in the input, whatever token
stands there; B is (r, d). A prompt of m tokens and the two matrices have as many parameters as a longer prompt, and
cost less attention. Z. Shi and A. Lipani, ICLR 2024, arXiv:2309.05173.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, scale_rates
from lightning_peft.adapters.native.features import FeatureLayer
from lightning_peft.adapters.native.mixtures import check_count, uniform
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.errors import ConfigError

__all__ = ["DePT", "DePTConfig"]


@dataclass
class DePTConfig(NativeConfig):
    """DePT: a short prompt and low-rank updates of embeddings by position. The target is a transformer without head.

    Args:
        num_prompts: Tokens of the prompt.
        r: Rank of the update.
        alpha: The update is scaled by ``alpha / sqrt(r)``.
        max_length: Positions of the input that have an update; those beyond have none.
        init_std: Standard deviation of the prompt at the start.
        low_rank_lr_ratio: Learning rate of A and B over that of the prompt.

    Paper: Z. Shi, A. Lipani 2024, arXiv:2309.05173, equation 2.
    """

    num_prompts: int = field(default=40)
    r: int = field(default=45)
    alpha: float = field(default=8.0)
    max_length: int = field(default=256)
    init_std: float = field(default=1.0)
    low_rank_lr_ratio: float = field(default=1.0)

    method: ClassVar[str] = "dept"
    places: ClassVar[dict[str, str]] = {
        "transformer": r".*\.(model|transformer|gpt_neox|bert|roberta|electra|deberta|esm|distilbert|backbone)"
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()
        check_count(self, "num_prompts", 1)
        check_count(self, "max_length", 1)
        self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_number("init_std", 0.0, float("inf"))
        self._check_number("low_rank_lr_ratio", 0.0, float("inf"), low_included=False)
        if self.dropout:
            raise ConfigError("DePTConfig: dropout has no meaning here, prompts and embeddings go in whole.")

    def make_driver(self, handle: Any, adapter_name: str) -> DePTDriver:
        """Return what gives the matrices their learning rate."""
        return DePTDriver(handle, adapter_name)


class DePTLayer(FeatureLayer):
    """A frozen transformer that is called with embeddings, behind a prompt, instead of tokens."""

    prefix = "dept_"
    trained = ("prompts", "A", "B")

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return the width of the word embeddings."""
        base: Any = self.get_base_layer()
        embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
        if embeddings is None or not isinstance(getattr(embeddings, "weight", None), Tensor):
            raise ConfigError(
                f"{path} is a {type(base).__name__}; DePT needs a model of transformers without head that takes "
                "inputs_embeds, such as 'model' in LlamaForCausalLM."
            )
        return "transformer", embeddings.weight.shape[1], embeddings.weight.shape[1]

    def __getattr__(self, name: str) -> Any:
        """Look up what a model's head asks of its transformer there, such as its embeddings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if the rank is larger than the embeddings are wide."""
        if config.r > self.in_features:
            raise ConfigError(
                f"r={config.r} is more than {path} has, whose embeddings have {self.in_features} features."
            )

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the prompt and of both factors."""
        width = self.in_features
        return {"prompts": (config.num_prompts, width), "A": (config.max_length, config.r), "B": (config.r, width)}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a normal prompt, a uniform A and B at zero."""
        shapes = self.shapes(config)
        prompts = torch.randn(shapes["prompts"], generator=generator, dtype=torch.float64) * config.init_std
        return {"prompts": prompts, "A": uniform(shapes["A"], generator)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer on prompt and changed embeddings; return what becomes of the input's tokens.

        Raises:
            ConfigError: If it is called in another way than by keywords, or with two adapters.
        """
        names = [name for name in self.active_adapters if name in self.settings]
        if self.disable_adapters or not names:
            return self.base_layer(*args, **kwargs)
        if len(names) > 1:
            raise ConfigError(f"DePT puts one prompt before the input, and {names} are active: choose one.")
        if len(args) > 1:
            raise ConfigError(
                f"{type(self.base_layer).__name__} is called with {len(args)} arguments without keywords."
            )
        if args:
            kwargs["input_ids"] = args[0]
        config: Any = self.settings[names[0]]
        past = kwargs.get("past_key_values")
        done = 0 if past is None else int(past.get_seq_length())
        x = self._embeddings(names[0], kwargs, max(0, done - config.num_prompts))
        starts = done == 0
        if starts:
            prompts = self.tensor("prompts", names[0]).to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([prompts, x], dim=1)
        kwargs = {**kwargs, "input_ids": None, "inputs_embeds": x, **_longer(kwargs, config.num_prompts, starts)}
        result = self.base_layer(**kwargs)
        return self._shorter(result, config.num_prompts) if starts else result

    def _embeddings(self, name: str, kwargs: dict[str, Any], position: int) -> Tensor:
        config: Any = self.settings[name]
        x = kwargs.get("inputs_embeds")
        if x is None:
            x = self.get_base_layer().get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        rows = self.tensor("A", name)[position : position + x.shape[1]]
        update = (rows @ self.tensor("B", name)) * (config.alpha / math.sqrt(config.r))
        return torch.cat([x[:, : len(rows)] + update.to(x.dtype), x[:, len(rows) :]], dim=1)

    def _shorter(self, result: Any, count: int) -> Any:
        if not hasattr(result, "last_hidden_state"):
            return (result[0][:, count:], *result[1:])
        result.last_hidden_state = result.last_hidden_state[:, count:]
        if getattr(result, "pooler_output", None) is not None:
            result.pooler_output = self.get_base_layer().pooler(result.last_hidden_state)  # type: ignore[operator]
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ConfigError: Always: a prompt is not part of any weight.
        """
        raise ConfigError("DePT cannot be merged: a prompt, and updates by position, are not part of any weight.")


def _longer(kwargs: dict[str, Any], count: int, starts: bool) -> dict[str, Any]:
    """Return masks and positions for a sequence with ``count`` more tokens before it."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    longer: dict[str, Any] = {}
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ConfigError(f"DePT: attention_mask of shape {tuple(mask.shape)}; (rows, tokens) is needed.")
        longer["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
    if isinstance(positions, Tensor):
        before = torch.arange(count, device=positions.device).expand(len(positions), -1)
        longer["position_ids"] = torch.cat([before, positions + count], dim=1) if starts else positions + count
    if isinstance(kwargs.get("token_type_ids"), Tensor):
        types = kwargs["token_type_ids"]
        longer["token_type_ids"] = torch.cat([types.new_zeros(len(types), count), types], dim=1)
    return longer


class DePTDriver(Driver):
    """Gives A and B a learning rate of their own."""

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Scale the learning rate of A and B."""
        config: Any = self.handle.peft_config[self.adapter_name]
        if config.low_rank_lr_ratio == 1:
            return
        layers = [module for module in self.handle.get_base_model().modules() if isinstance(module, DePTLayer)]
        matrices = [layer.tensor(role, self.adapter_name) for layer in layers for role in "AB"]
        scale_rates(trainer, matrices, config.low_rank_lr_ratio)


class DePTTuner(NativeTuner):
    """Puts DePT into a model."""

    prefix = "dept_"
    tuner_layer_cls = DePTLayer


register("dept", DePTConfig, DePTTuner)


class DePT(Adapter):
    """Train a short soft prompt, and low-rank updates of the word embeddings by position.

    ``num_prompts * width + rank * (max_length + width)`` parameters in all. The sequence grows by ``num_prompts``
    tokens, in use too. Labels and outputs keep their lengths. The model does not start as its base, and it cannot be
    merged.

    Use it instead of prompt tuning, at the same number of parameters and with less attention to pay for.

    Args:
        num_prompts: Tokens of the prompt.
        rank: Of the update.
        alpha: The update is scaled by ``alpha / sqrt(rank)``.
        max_length: Positions of the input that have an update; those beyond have none.
        init_std: Standard deviation of the prompt at the start.
        low_rank_lr_ratio: Learning rate of the update's factors over that of the prompt, which is the module's own. The
            paper gives the prompt a much higher one.
        layers: The transformer inside the target: ``"transformer"``, or its path.
        target: Path of the submodule that gets the adapter, a model of transformers with a head.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If there is no such transformer, or it is called with a mask that is not one number per token.

    Example:
        >>> from lightning_peft import DePT
        >>> DePT(num_prompts=40, rank=45, low_rank_lr_ratio=1e-3).method
        'dept'

    Paper:
        Z. Shi, A. Lipani: DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning, ICLR 2024,
        arXiv:2309.05173, equation 2.

    Differs from the paper:
        The prompt starts random, not from words of the vocabulary. Behind the last block the prompt's tokens are taken
        out, which a decoder of an encoder-decoder model would see.
    """

    def __init__(
        self,
        num_prompts: int = 40,
        rank: int = 45,
        alpha: float = 8.0,
        max_length: int = 256,
        init_std: float = 1.0,
        low_rank_lr_ratio: float = 1.0,
        layers: str | list[str] = "transformer",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.num_prompts, self.rank, self.alpha, self.max_length = num_prompts, rank, alpha, max_length
        self.init_std, self.low_rank_lr_ratio = init_std, low_rank_lr_ratio
        config: dict[str, Any] = {
            "num_prompts": num_prompts,
            "r": rank,
            "alpha": alpha,
            "max_length": max_length,
            "init_std": init_std,
            "low_rank_lr_ratio": low_rank_lr_ratio,
            "seed": seed,
        }
        super().__init__("dept", config, target, layers, adapter_name, always, seed)
