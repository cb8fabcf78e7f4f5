"""Small models that native adapters are put into: a Llama, a GPT-2, a BERT, a vision transformer of plain modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.precision.tiny import VOCAB, tiny_llama


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def tiny_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tiny_bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, num_labels=5, initializer_range=0.2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "vit": ["patches", "qkv", "fc2"],
}


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "vit": TinyViT}[name]()


def batch(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return torch.randn(4, 3, 8, 8, generator=generator)
    return torch.randint(0, VOCAB, (3, 6), generator=generator)


def output(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def loss(model: Any, x: Tensor) -> Tensor:
    return output(model, x).float().log_softmax(-1)[..., 1].mean().neg()


def matrix_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a base layer, by its own attributes."""
    if isinstance(layer, nn.Conv2d):
        return layer.weight.shape[0], layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.weight.shape[1], layer.weight.shape[0]
