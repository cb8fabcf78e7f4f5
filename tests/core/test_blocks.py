"""Blocks and roles of many architectures, asserted by name. Models are built from tiny configs, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft.core.blocks import Structure, find_structure, is_norm
from lightning_peft.core.names import clean_name, named_modules, named_parameters, parameter_aliases, unwrap

LLAMA: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
T5: dict[str, Any] = {"vocab_size": 17, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 3, "num_heads": 2}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 17,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
TOWER: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_TOWER: dict[str, Any] = {**TOWER, "vocab_size": 17, "max_position_embeddings": 8}
VISION_TOWER: dict[str, Any] = {**TOWER, "image_size": 8, "patch_size": 4}


def hf(name: str, config: str, **values: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**values))


# peft 0.21 reads an attribute that transformers 5.23 calls by another name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# ---------------------------------------------------------------------------------------------------- plain modules


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.fc(x)))


class Stacked(nn.Module):
    """Embedding, the given blocks, head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 5)


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)


class TextCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)


class TwoNames(nn.Module):
    """A LightningModule's habit: a shortcut to an inner part, registered as a second path."""

    def __init__(self, shortcut_first: bool) -> None:
        super().__init__()
        model = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)
        if shortcut_first:
            self.backbone = model.model
        self.model = model
        if not shortcut_first:
            self.backbone = model.model


def shared_block() -> nn.Module:
    block = Block()
    return Stacked(block, block, block)


def block_used_twice() -> nn.Module:
    block = Block()
    return Stacked(block, Block(), block)


def lora(**extra: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **extra)
    return peft.get_peft_model(hf("LlamaForCausalLM", "LlamaConfig", **LLAMA), config)  # pyright: ignore[reportArgumentType]


def plain_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def stem_blocks_head() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), Block(), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 3))


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """What must be found.

    Args:
        make: Builds the model.
        blocks: Stack path -> number of blocks, called ``<stack>.<index>`` unless ``names`` says otherwise.
        embeddings: Parameter names, or module paths that stand for all below.
        head: The same.
        norms: The same, those outside the blocks.
        names: All block names, where they are not consecutive numbers.
        beside: Block name -> path of a module that belongs to it without lying in it.
    """

    make: Callable[[], nn.Module]
    blocks: dict[str, int]
    embeddings: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    names: tuple[str, ...] = field(default=())
    beside: dict[str, str] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "llama": Case(
        lambda: hf("LlamaForCausalLM", "LlamaConfig", **LLAMA),
        {"model.layers": 3},
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.norm.weight",),
    ),
    "llama_tied": Case(
        lambda: hf("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True),
        {"model.layers": 3},
        ("model.embed_tokens.weight",),
        ("model.embed_tokens.weight",),
        ("model.norm.weight",),
    ),
    "llama_one_layer": Case(
        lambda: hf("LlamaForCausalLM", "LlamaConfig", **{**LLAMA, "num_hidden_layers": 1}),
        {"model.layers": 1},
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.norm.weight",),
    ),
    "qwen2": Case(
        lambda: hf("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
        {"model.layers": 3},
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.norm.weight",),
    ),
    "gpt2": Case(
        lambda: hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=17,
            n_positions=8,
            n_embd=8,
            n_layer=3,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        ),
        {"transformer.h": 3},
        ("transformer.wte.weight", "transformer.wpe.weight"),
        ("transformer.wte.weight",),
        ("transformer.ln_f",),
    ),
    "mixtral": Case(
        lambda: hf("MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=2),
        {"model.layers": 3},
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.norm.weight",),
    ),
    "jamba": Case(
        lambda: hf(
            "JambaForCausalLM",
            "JambaConfig",
            **{**LLAMA, "num_hidden_layers": 4},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
        ),
        {"model.layers": 4},
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.final_layernorm.weight",),
    ),
    "mamba": Case(
        lambda: hf(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=17,
            hidden_size=8,
            num_hidden_layers=3,
            state_size=4,
            bos_token_id=1,
            eos_token_id=1,
        ),
        {"backbone.layers": 3},
        ("backbone.embeddings.weight",),
        ("backbone.embeddings.weight",),
        ("backbone.norm_f.weight",),
    ),
    "bert": Case(
        lambda: hf("BertForSequenceClassification", "BertConfig", **BERT),
        {"bert.encoder.layer": 3},
        ("bert.embeddings",),
        ("bert.pooler", "classifier"),
        ("bert.embeddings.LayerNorm",),
    ),
    "bert_masked_lm": Case(
        lambda: hf("BertForMaskedLM", "BertConfig", **BERT),
        {"bert.encoder.layer": 3},
        ("bert.embeddings",),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.transform.dense"),
        ("bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"),
    ),
    "albert": Case(
        lambda: hf("AlbertForSequenceClassification", "AlbertConfig", **BERT, embedding_size=4),
        {"albert.encoder.albert_layer_groups": 1},
        ("albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"),
        ("albert.pooler", "classifier"),
        ("albert.embeddings.LayerNorm",),
    ),
    "t5": Case(
        lambda: hf("T5ForConditionalGeneration", "T5Config", **T5),
        {"encoder.block": 3, "decoder.block": 3},
        ("shared.weight",),
        ("shared.weight",),
        ("encoder.final_layer_norm", "decoder.final_layer_norm"),
    ),
    "t5_encoder": Case(
        lambda: hf("T5EncoderModel", "T5Config", **T5),
        {"encoder.block": 3},
        ("shared.weight",),
        (),
        ("encoder.final_layer_norm",),
    ),
    "bart": Case(
        lambda: hf("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ, max_position_embeddings=8),
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        ("model.shared.weight", "model.encoder.embed_positions", "model.decoder.embed_positions"),
        ("model.shared.weight",),
        ("model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"),
    ),
    "whisper": Case(
        lambda: hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=8,
        ),
        {"model.encoder.layers": 2, "model.decoder.layers": 2},
        (
            "model.encoder.conv1",
            "model.encoder.conv2",
            "model.encoder.embed_positions",
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
        ),
        ("model.decoder.embed_tokens",),
        ("model.encoder.layer_norm", "model.decoder.layer_norm"),
    ),
    "wav2vec2": Case(
        lambda: hf(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **{**BERT, "num_hidden_layers": 2, "max_position_embeddings": 8},
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        {"wav2vec2.encoder.layers": 2},
        (
            "wav2vec2.masked_spec_embed",
            "wav2vec2.feature_extractor",
            "wav2vec2.feature_projection",
            "wav2vec2.encoder.pos_conv_embed",
            "wav2vec2.encoder.layer_norm",
        ),
        ("lm_head",),
        (
            "wav2vec2.feature_extractor.conv_layers.0.layer_norm",
            "wav2vec2.feature_projection.layer_norm",
            "wav2vec2.encoder.layer_norm",
        ),
    ),
    "vit": Case(
        lambda: hf("ViTForImageClassification", "ViTConfig", **VISION_TOWER),
        {"vit.layers": 2},
        ("vit.embeddings",),
        ("classifier",),
        ("vit.layernorm",),
    ),
    "clip": Case(
        lambda: hf("CLIPModel", "CLIPConfig", text_config=TEXT_TOWER, vision_config=VISION_TOWER, projection_dim=8),
        {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2},
        ("text_model.embeddings", "vision_model.embeddings", "vision_model.pre_layrnorm"),
        ("logit_scale", "visual_projection", "text_projection"),
        ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"),
    ),
    "swin": Case(
        lambda: hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=2,
        ),
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2},
        ("swin.embeddings",),
        ("classifier",),
        ("swin.embeddings.norm", "swin.layernorm"),
        beside={"swin.encoder.layers.0.blocks.1": "swin.encoder.layers.0.downsample"},  # after its stage's blocks
    ),
    "convnext": Case(
        lambda: hf(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[4, 8], depths=[2, 3], num_stages=2
        ),
        {"convnext.encoder.stages.0.layers": 2, "convnext.encoder.stages.1.layers": 3},
        ("convnext.embeddings",),
        ("classifier",),
        ("convnext.embeddings.layernorm", "convnext.layernorm"),
        beside={"convnext.encoder.stages.1.layers.0": "convnext.encoder.stages.1.downsampling_layer"},  # before them
    ),
    "resnet": Case(
        lambda: hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[2, 2],
            layer_type="basic",
        ),
        {"resnet.encoder.stages.0.layers": 2, "resnet.encoder.stages.1.layers": 2},
        ("resnet.embedder",),
        ("classifier",),
        ("resnet.embedder.embedder.normalization",),
    ),
    "llava": Case(
        lambda: llava(),
        {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 3},
        (
            "model.vision_tower.embeddings",
            "model.vision_tower.pre_layrnorm",
            "model.multi_modal_projector",
            "model.language_model.embed_tokens",
        ),
        ("lm_head",),
        (
            "model.vision_tower.pre_layrnorm",
            "model.vision_tower.post_layernorm",
            "model.language_model.norm",
        ),
    ),
    "lora": Case(
        lambda: lora(),
        {"base_model.model.model.layers": 3},
        ("base_model.model.model.embed_tokens",),
        ("base_model.model.lm_head",),
        ("base_model.model.model.norm",),
    ),
    "transformer_encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3), {"layers": 3}
    ),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 2, 3, 12, batch_first=True),
        {"encoder.layers": 2, "decoder.layers": 3},
        norms=("encoder.norm", "decoder.norm"),
    ),
    "mlp": Case(plain_mlp, {"": 2}, head=("4",), names=("0", "2")),
    "stem_blocks_head": Case(stem_blocks_head, {"": 3}, ("0",), ("5",), ("4",), names=("1", "2", "3")),
    "plain_cnn": Case(PlainCNN, {"": 2}, head=("fc",), names=("conv1", "conv2")),
    "recurrent": Case(TextCNN, {"": 2}, ("embed",), ("out",), names=("lstm", "hidden")),
    "single_layer": Case(lambda: nn.Linear(3, 2), {}, head=("weight", "bias")),
    "shared_block": Case(shared_block, {"blocks": 1}, ("tokens",), ("head",)),
    "block_used_twice": Case(block_used_twice, {"blocks": 2}, ("tokens",), ("head",)),
    "second_path_to_the_backbone": Case(
        lambda: TwoNames(shortcut_first=False),
        {"model.model.layers": 3},
        ("model.model.embed_tokens",),
        ("model.lm_head",),
        ("model.model.norm",),
    ),
    "first_path_to_the_backbone": Case(
        lambda: TwoNames(shortcut_first=True),
        {"backbone.layers": 3},
        ("backbone.embed_tokens",),
        ("model.lm_head",),
        ("backbone.norm",),
    ),
}


def llava() -> nn.Module:
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION_TOWER),
        text_config=transformers.LlamaConfig(**LLAMA),
    )
    return transformers.LlavaForConditionalGeneration(config)


@functools.cache
def model_of(case: str) -> nn.Module:
    return CASES[case].make()


@functools.cache
def structure_of(case: str) -> Structure:
    return find_structure(model_of(case))


def expand(model: nn.Module, paths: tuple[str, ...]) -> set[str]:
    """Parameter names at or below the paths, straight from torch; each path must stand for something."""
    found: set[str] = set()
    for path in paths:
        below = {n for n, _ in model.named_parameters() if n == path or n.startswith(f"{path}.")}
        assert below, path
        found |= below
    return found


@pytest.mark.parametrize("case", CASES)
def test_structure_is_found(case: str) -> None:
    expected, model, structure = CASES[case], model_of(case), structure_of(case)
    names = expected.names or tuple(f"{s}.{i}" for s, count in expected.blocks.items() for i in range(count))
    assert tuple(block.name for block in structure.blocks) == names
    assert structure.stacks == tuple(expected.blocks)
    assert [sum(b.stack == s for b in structure.blocks) for s in structure.stacks] == list(expected.blocks.values())
    inside = set(structure.roles["blocks"])
    assert set(structure.roles["embeddings"]) == expand(model, expected.embeddings)
    assert set(structure.roles["head"]) == expand(model, expected.head)
    assert set(structure.roles["norms"]) - inside == expand(model, expected.norms)


@pytest.mark.parametrize("case", CASES)
def test_blocks_hold_what_lies_below_them(case: str) -> None:
    """Those that torch finds below its path, plus a plain layer's norms or what lies beside the blocks of a stage."""
    model, structure = model_of(case), structure_of(case)
    seen: list[str] = []
    for block in structure.blocks:
        below = expand(model, (block.name,))
        beside = CASES[case].beside.get(block.name)
        below |= expand(model, (beside,)) if beside else set()
        extra = set(block.parameters) - below
        assert below <= set(block.parameters)
        assert list(block.parameters) == [name for name in structure.parameters if name in set(block.parameters)]
        assert not extra or (block.stack == "" and extra <= set(structure.roles["norms"]))
        seen += block.parameters
    assert len(seen) == len(set(seen))
    assert set(seen) == set(structure.roles["blocks"]) == set(structure.block_of())


@pytest.mark.parametrize("case", CASES)
def test_roles_cover_every_parameter(case: str) -> None:
    check_roles(model_of(case), structure_of(case))


def check_roles(model: nn.Module, structure: Structure) -> None:
    parameters = [name for name, _ in model.named_parameters()]
    assert list(structure.parameters) == list(structure.roles["all"]) == parameters
    roles = {role: set(names) for role, names in structure.roles.items()}
    assert roles["blocks"] | roles["embeddings"] | roles["head"] | roles["norms"] == set(parameters)
    assert not roles["blocks"] & (roles["embeddings"] | roles["head"])
    for role, names in structure.roles.items():
        assert list(names) == [name for name in parameters if name in roles[role]]
    biases = {n for n, p in model.named_parameters() if p.ndim <= 1 and "bias" in n.rpartition(".")[2]}
    assert roles["biases"] >= biases
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        assert structure.parameters[structure.aliases[alias]] is parameter


# ---------------------------------------------------------------------------------------------------- adapters


def test_adapter_role_is_what_peft_trains() -> None:
    model, structure = model_of("lora"), structure_of("lora")
    adapters = set(structure.roles["adapters"])
    assert adapters == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 3 * 2 * 2
    assert adapters <= set(structure.roles["blocks"])
    assert not structure_of("llama").roles["adapters"]


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "PrefixTuningConfig"])
def test_adapter_role_of_other_methods(kind: str) -> None:
    import peft

    arguments: dict[str, dict[str, Any]] = {
        "IA3Config": {"target_modules": ["k_proj"], "feedforward_modules": []},
        "PromptTuningConfig": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
        "PrefixTuningConfig": {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"},
    }
    base = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)
    model = peft.get_peft_model(base, getattr(peft, kind)(**arguments[kind]))  # pyright: ignore[reportArgumentType]
    structure = find_structure(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert set(structure.roles["adapters"]) == trained
    check_roles(model, structure)


# ---------------------------------------------------------------------------------------------------- wrappers


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # pyright: ignore[reportReturnType]


def compiled_blocks(model: nn.Module) -> nn.Module:
    for index, layer in enumerate(model.model.layers):  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        model.model.layers[index] = torch.compile(layer, backend="eager")  # pyright: ignore
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, layer in enumerate(model.model.layers):  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        model.model.layers[index] = checkpoint_wrapper(layer)  # pyright: ignore
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled_whole": compiled_whole,
    "compiled_blocks": compiled_blocks,
    "checkpointed_blocks": checkpointed_blocks,
    "checkpointed_then_compiled_blocks": lambda m: compiled_blocks(checkpointed_blocks(m)),
    "compiled_blocks_in_a_compiled_model": lambda m: compiled_whole(compiled_blocks(m)),
    "compiled_inside_a_module": lambda m: nn.ModuleDict({"model": compiled_whole(m)}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_have_clean_names(wrapper: str) -> None:
    plain = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)
    nested = wrapper == "compiled_inside_a_module"
    expected = find_structure(nn.ModuleDict({"model": plain}) if nested else plain)
    expected_aliases = parameter_aliases(nn.ModuleDict({"model": plain}) if nested else plain)
    wrapped = WRAPPERS[wrapper](plain)
    found = find_structure(wrapped)
    assert any("_orig_mod" in n or "_wrapped" in n for n, _ in wrapped.named_modules())
    assert found.blocks == expected.blocks
    assert found.roles == expected.roles
    assert found.aliases == expected.aliases == expected_aliases
    assert list(found.parameters) == list(expected.parameters)
    assert all(found.parameters[name] is parameter for name, parameter in expected.parameters.items())
    assert list(found.modules) == list(expected.modules)
    assert all(found.modules[path] is module for path, module in expected.modules.items() if path)


def test_clean_name() -> None:
    assert clean_name("model.layers.0._orig_mod._checkpoint_wrapped_module.fc.weight") == "model.layers.0.fc.weight"
    assert clean_name("_fsdp_wrapped_module.fc.weight") == "fc.weight"
    assert clean_name("my_orig_mod_layer.weight") == "my_orig_mod_layer.weight"
    assert clean_name("") == ""


def test_names_of_shared_modules() -> None:
    model = block_used_twice()
    paths = [path for path, _ in named_modules(model)]
    assert "blocks.0.fc" in paths
    assert "blocks.2.fc" not in paths
    assert dict(named_modules(model, remove_duplicate=False))["blocks.2.fc"] is unwrap(model.blocks[0]).fc  # pyright: ignore
    assert parameter_aliases(model)["blocks.2.fc.weight"] == "blocks.0.fc.weight"
    assert "blocks.2.fc.weight" not in named_parameters(model)


# ---------------------------------------------------------------------------------------------------- edges


def test_lists_of_experts_are_no_stack() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList([Block(), Block()])

    lonely = nn.ModuleDict({"moe": Sparse(), "head": nn.Linear(4, 2)})
    assert not any("experts" in stack for stack in find_structure(lonely).stacks)
    assert find_structure(Stacked(Sparse(), Sparse())).stacks == ("blocks",)


def test_small_heads_are_no_stack() -> None:
    """Two small composite heads beside a large stack belong to the head."""
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([Block(64) for _ in range(4)]),
            "heads": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)]),
        }
    )
    structure = find_structure(model)
    assert structure.stacks == ("blocks",)
    assert set(structure.roles["head"]) == expand(model, ("heads",))


def test_tied_to_a_weight_inside_the_blocks() -> None:
    """A head tied to a block's weight lies in the block: it trains with it."""
    model = Stacked(Block(), Block())
    model.head = nn.Linear(4, 4, bias=False)
    model.head.weight = model.blocks[0].fc.weight  # pyright: ignore
    structure = find_structure(model)
    assert structure.aliases["head.weight"] == "blocks.0.fc.weight"
    assert structure.roles["head"] == ()
    check_roles(model, structure)


def test_roles_outside_the_blocks() -> None:
    outside = structure_of("llama").outside_blocks()
    assert outside.roles["norms"] == ("model.norm.weight",)
    assert outside.roles["blocks"] == ()
    assert outside.roles["embeddings"] == structure_of("llama").roles["embeddings"]
    assert len(outside.parameters) == len(structure_of("llama").parameters)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(2), True),
        (nn.BatchNorm1d(2, affine=False), True),
        (nn.GroupNorm(1, 2), True),
        (nn.RMSNorm(2), True),
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.LayerNorm(2)), False),
    ],
)
def test_is_norm(module: nn.Module, expected: bool) -> None:
    assert is_norm(module) is expected


def test_a_model_without_parameters() -> None:
    structure = find_structure(nn.Sequential(nn.ReLU(), nn.Flatten()))
    assert structure.blocks == ()
    assert set(map(len, structure.roles.values())) == {0}


leaves = st.sampled_from(
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.LayerNorm(2),
        lambda: nn.Embedding(3, 2),
        nn.ReLU,
        Block,
        lambda: nn.Conv1d(2, 2, 1),
    ]
)


def containers(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    lists = st.lists(children, max_size=4)
    return st.one_of(
        lists.map(lambda parts: nn.Sequential(*parts)),
        lists.map(nn.ModuleList),
        lists.map(lambda parts: nn.ModuleDict({f"part_{i}": p for i, p in enumerate(parts)})),
        children.map(lambda part: nn.ModuleList([part, part])),
    )


@settings(max_examples=200, deadline=None)
@given(model=st.recursive(leaves.map(lambda make: make()), containers, max_leaves=12))
def test_any_tree_of_modules(model: nn.Module) -> None:
    structure = find_structure(model)
    check_roles(model, structure)
    seen = [name for block in structure.blocks for name in block.parameters]
    assert len(seen) == len(set(seen))
    assert all(block.parameters for block in structure.blocks)
    again = find_structure(model)
    assert (again.blocks, again.roles) == (structure.blocks, structure.roles)
