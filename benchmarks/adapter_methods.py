"""The rows and models of ``benchmarks.adapter_table``: every adapter method with options that fit small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft
from lightning_peft.adapters.adapter import Adapter

__all__ = ["METHODS", "MODELS", "NATIVE", "Method", "Model"]

WIDTH, VOCAB, CLASSES = 16, 19, 5


# ---------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Plain(nn.Module):
    """Nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(ConvBlock(), ConvBlock())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_labels=CLASSES, initializer_range=0.2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tokens(rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randint(0, VOCAB, (rows, 6), generator=generator)
    return x, torch.randint(0, CLASSES, (rows, 1), generator=generator), _tasks(rows, generator)


def _text(rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randint(0, VOCAB, (rows, 6), generator=generator)
    return x, x.roll(-1, 1), _tasks(rows, generator)


def _images(rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    return x, torch.randint(0, CLASSES, (rows, 1), generator=generator), _tasks(rows, generator)


def _tasks(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows,), generator=generator)


def _last(model: nn.Module, x: Tensor) -> Tensor:
    kinds = {str(c.peft_type) for c in getattr(model, "peft_config", {}).values()}
    more = {"task_ids": torch.zeros(len(x), dtype=torch.long)} if "PeftType.MULTITASK_PROMPT_TUNING" in kinds else {}
    out: Any = model(input_ids=x, use_cache=False, **more)
    return out.logits[:, -x.shape[1] :]  # some prompts lengthen the output


@dataclass(frozen=True)
class Model:
    """A model that methods are put into.

    Args:
        title: Of its table.
        build: Makes it, with random weights.
        data: (rows, generator) -> inputs, targets, task ids.
        output: (model, inputs) -> logits, (rows, ..., classes).
        linear: Names of the layers that most methods are put on.
        square: Of those, the ones as wide as they are high.
        norm: Names of a norm.
        head: Paths left in full precision on a quantised base.
        is_language_model: Whether ``peft``'s prompt methods know it.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    output: Callable[[nn.Module, Tensor], Tensor]
    linear: list[str]
    square: list[str]
    norm: list[str]
    head: list[str]
    embedding: list[str] = field(default_factory=list)
    is_language_model: bool = False


MODELS = {
    "plain": Model(
        "Plain modules", Plain, _tokens, lambda model, x: model(x)[:, None], ["fc1", "fc2"], ["fc1", "fc2"], ["norm"],
        ["model.head"], ["embed"],
    ),
    "vit": Model(
        "Vision transformer (transformers)", _vit, _images, lambda model, x: model(pixel_values=x).logits[:, None],
        ["q_proj", "v_proj", "fc2"], ["q_proj", "v_proj"], ["layernorm_before"], ["model.classifier"],
    ),
    "llama": Model(
        "Llama (transformers)", _llama, _text, _last, ["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj"],
        ["input_layernorm"], ["model.lm_head"], ["embed_tokens"], True,
    ),
    "conv": Model(
        "Convolutional network with BatchNorm", ConvNet, _images, lambda model, x: model(x)[:, None], ["conv"],
        ["conv"], ["norm"], ["model.head"],
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        make: Kind of model -> the callback.
        changes_base: The method changes base weights when it starts, by design.
        starts_elsewhere: It does not start at the base's output, by design.
        moves_more: It moves base weights, by design.
        sets: Parts of the names of parameters that the method sets itself.
        may_rest: Some of what may train need not have moved after six steps (ranks taken away, masks, routers).
        takes_the_models_place: ``peft`` works by another ``forward`` of the model.
        merges_into: Suffixes of parameters that the merged model has and the base has not.
        not_as_one: Why two processes cannot compute what one does on the joined batch, by design.
        only: Kinds of model that the method is for, and what to say of others.
    """

    make: Callable[[str], Any]
    changes_base: bool = False
    starts_elsewhere: bool = False
    moves_more: bool = False
    sets: tuple[str, ...] = ()
    may_rest: bool = False
    takes_the_models_place: bool = False
    merges_into: tuple[str, ...] = ()
    not_as_one: str = ""
    only: tuple[tuple[str, ...], str] | None = None


def _peft(method: str, targets: str | None = "linear", **options: Any) -> Callable[[str], Adapter]:
    def make(kind: str) -> Adapter:
        config = {name: value(kind) if callable(value) else value for name, value in options.items()}
        if targets is not None:
            config["target_modules"] = list(getattr(MODELS[kind], targets))
        return Adapter(method, config)

    return make


def _ours(name: str, **options: Any) -> Callable[[str], Any]:
    def make(kind: str) -> Any:
        layers = [f"*.{layer}" for layer in MODELS[kind].linear]
        return getattr(lightning_peft, name)(**{"layers": layers, **options})

    return make


_PROMPT: dict[str, Any] = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}

_CALIBRATES = "starts from batches of another size than one process"
_DRAWS = "each process draws noise of its own"

METHODS: dict[str, Method] = {
    "lora": Method(_peft("lora", r=2)),
    "lora, rank-stabilised": Method(_peft("lora", r=2, use_rslora=True)),
    "dora": Method(_peft("lora", r=2, use_dora=True)),
    "pissa": Method(_peft("lora", r=2, init_lora_weights="pissa"), changes_base=True),
    "pissa, fast": Method(_peft("lora", r=2, init_lora_weights="pissa_niter_4"), changes_base=True),
    "olora": Method(_peft("lora", r=2, init_lora_weights="olora"), changes_base=True),
    "mica": Method(_peft("lora", r=2, init_lora_weights="mica")),
    "eva": Method(_ours("EVA", rank=2), not_as_one=_CALIBRATES),
    "corda": Method(_ours("CorDA", rank=2), changes_base=True, not_as_one=_CALIBRATES),
    "lora_ga": Method(_ours("LoRAGA", rank=2), changes_base=True, not_as_one=_CALIBRATES),
    "kasa": Method(_ours("KaSA", rank=2), changes_base=True, starts_elsewhere=True),
    "monteclora": Method(_peft("lora", r=2, monteclora_config=lambda _: {}), starts_elsewhere=True),
    "adalora": Method(_peft("adalora", init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2), may_rest=True),
    "adamss": Method(_peft("adamss", r=4, num_subspaces=2), may_rest=True),
    "ia3": Method(_peft("ia3", feedforward_modules=lambda _: [])),
    "vera": Method(_peft("vera", "square", r=4)),
    "pvera": Method(_peft("pvera", "square", r=4), not_as_one=_DRAWS),
    "frod": Method(_peft("frod", "square")),
    "vblora": Method(
        _peft("vblora", "square", r=2, num_vectors=10, vector_length=4, topk=2), starts_elsewhere=True, may_rest=True
    ),
    "unilora": Method(_peft("unilora", "square", r=2), starts_elsewhere=True),
    "tinylora": Method(_peft("tinylora", "square")),
    "loha": Method(_peft("loha", r=2)),
    "lokr": Method(_peft("lokr", r=2)),
    "glora": Method(_peft("glora", r=2), may_rest=True),
    "hira": Method(_peft("hira", r=2)),
    "hra": Method(_peft("hra", r=2)),
    "oft": Method(_peft("oft", oft_block_size=4)),
    "boft": Method(_peft("boft", boft_block_size=4)),
    "miss": Method(_peft("miss", r=2)),
    "randlora": Method(_peft("randlora", "square", r=2, randlora_alpha=4)),
    "road": Method(_peft("road", group_size=8)),
    "fourierft": Method(_peft("fourierft", n_frequency=10), starts_elsewhere=True),
    "waveft": Method(_peft("waveft", n_frequency=10), starts_elsewhere=True),
    "c3a": Method(_peft("c3a", block_size=8), starts_elsewhere=True),
    "shira": Method(_peft("shira", r=2)),
    "supertuning": Method(_peft("supertuning")),
    "osf": Method(_peft("osf"), moves_more=True, changes_base=True),
    "delora": Method(_peft("delora", r=2)),
    "gralora": Method(_peft("gralora", r=4, gralora_k=2)),
    "psoft": Method(_peft("psoft", r=2)),
    "peanut": Method(_peft("peanut")),
    "deft": Method(_peft("deft", r=2)),
    "lily": Method(_peft("lily", r=2), not_as_one="its routers average over the batch of the process"),
    "beft": Method(_peft("beft")),
    "ln_tuning": Method(_peft("ln_tuning", "norm")),
    "trainable_tokens": Method(_peft("trainable_tokens", "embedding", token_indices=lambda _: [1, 2])),
    "poly": Method(lambda kind: lightning_peft.Poly(**_poly(kind)), starts_elsewhere=True, not_as_one=_DRAWS),
    "xlora": Method(_peft("xlora", None)),
    "prompt_tuning": Method(
        _peft("prompt_tuning", None, **_PROMPT), starts_elsewhere=True, takes_the_models_place=True
    ),
    "p_tuning": Method(
        _peft("p_tuning", None, encoder_hidden_size=8, **_PROMPT), starts_elsewhere=True, takes_the_models_place=True
    ),
    "prefix_tuning": Method(
        _peft("prefix_tuning", None, **_PROMPT), starts_elsewhere=True, takes_the_models_place=True
    ),
    "multitask_prompt_tuning": Method(
        _peft("multitask_prompt_tuning", None, num_tasks=2, **_PROMPT),
        starts_elsewhere=True,
        takes_the_models_place=True,
    ),
    "cartridge": Method(_peft("cartridge", None, **_PROMPT), starts_elsewhere=True, takes_the_models_place=True),
    "cpt": Method(_peft("cpt", None), starts_elsewhere=True, takes_the_models_place=True),
    "adaption_prompt": Method(
        _peft("adaption_prompt", None, adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"),
        takes_the_models_place=True,
    ),
    "shadow": Method(_peft("shadow", None, task_type="CAUSAL_LM"), takes_the_models_place=True, may_rest=True),
}


def _poly(kind: str) -> dict[str, Any]:
    return {"rank": 2, "num_tasks": 2, "task_ids": 2, "layers": [f"*.{layer}" for layer in MODELS[kind].linear]}


NATIVE: set[str] = set()
"""Rows of methods that this package adds to ``peft``'s."""

_BOTTLENECKS = {"SeriesAdapter", "ParallelAdapter", "Compacter", "MoSA", "VLPET"}
_PLACED = _BOTTLENECKS | {"LoFiT", "VPT", "NTKAttention", "DePT"}


def _add(name: str, cls: str, **traits: Any) -> None:
    options = {**traits.pop("options", {})}
    if cls in _PLACED:  # these find their places themselves
        own = {"plain": {"layers": "*.fc2"}} if cls in _BOTTLENECKS else {}
        METHODS[name] = Method(lambda kind: getattr(lightning_peft, cls)(**options, **own.get(kind, {})), **traits)
    else:
        METHODS[name] = Method(_ours(cls, **options), **traits)
    NATIVE.add(name)


_RANK: dict[str, Any] = {"rank": 2}
_SUBSPACES: dict[str, Any] = {
    "rank": 4, "num_subspaces": 2, "target_subspaces": 4, "start_step": 1, "end_step": 4, "period_steps": 1,
}  # fmt: skip
_GROWS = {"target_rank": 2, "period_steps": 1}
_add("lora+", "LoRAPlus", options=_RANK)
_add("lora-fa", "LoRAFA", options=_RANK)
_add("pego", "PEGO", options={"rank": 2, "group_size": 2})
_add("lae", "LAE", options={"config": {"r": 2}, "freeze_epochs": 0}, sets=("_offline",))
_add("adamss, allocated", "AdaMSS", options=_SUBSPACES, may_rest=True)
_add(
    "ba-lora", "BALoRA", options={"rank": 2, "labels": 1, "top_tokens": 5, "top_singular": 2}, changes_base=True,
    not_as_one="the spectrum is that of the batch of its process",
)  # fmt: skip
_add("lora_xs", "LoRAXS", options=_RANK)
_add("lora_sb", "LoRASB", options=_RANK, starts_elsewhere=True, not_as_one=_CALIBRATES)
_add("slora", "SLoRA", options=_RANK)
_add("nlora", "NLoRA", options=_RANK)
_add("inttune", "IntTune", options=_RANK)
_add("loldu", "LoLDU", options=_RANK)
_add(
    "increlora", "IncreLoRA", options=_GROWS, may_rest=True, sets=("increlora_E",),
    not_as_one="scores are means over the processes",
)  # fmt: skip
_add("triadapt_lora", "TriAdaptLoRA", options=_GROWS, may_rest=True)
_add("ssf", "SSF", starts_elsewhere=True, merges_into=("bias",))
_add("series adapter", "SeriesAdapter", options=_RANK)
_add("parallel adapter", "ParallelAdapter", options=_RANK)
_add("compacter", "Compacter", options={"rank": 4})
_add("mosa", "MoSA", options={"rank": 4}, not_as_one=_DRAWS, may_rest=True)
_add("vl-pet", "VLPET", options={"rank": 2, "gate_rank": 2}, starts_elsewhere=True)
_add("lofit", "LoFiT", starts_elsewhere=True, merges_into=("bias",))
_add(
    "loramoe", "LoRAMoE", options={"rank": 2, "num_experts": 2, "task_types": 2},
    not_as_one="the balance of experts is that of the batch of its process",
)  # fmt: skip
_add("mtlora", "MTLoRA", options={"num_tasks": 2, "rank": 2, "task_rank": 2, "task_ids": 2}, may_rest=True)
_add("vpt", "VPT", options={"num_prompts": 2}, starts_elsewhere=True)
_add("ntk-attention", "NTKAttention", starts_elsewhere=True)
_add("dept", "DePT", options={"num_prompts": 2, "rank": 2, "max_length": 8}, starts_elsewhere=True)
