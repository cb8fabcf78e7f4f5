"""Run by ``test_tensor_parallel.py`` on four processes: two that share multiplications, times two with data."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft import FSDP2Strategy
from lightning_peft.core.sharded import local
from tests.strategies import fsdp2_probe as base

PLAN = {"model.0": "colwise", "model.2": "rowwise"}


def even() -> nn.Module:
    """Vocabulary and heads divide by two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    )


def tied() -> nn.Module:
    model = even()
    config: Any = model.config
    config.tie_word_embeddings = True
    return type(model)(config)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (lambda: base.Language(even), {}, {}),
    "uneven vocabulary": (lambda: base.Language(base.llama), {}, {}),
    "tied": (lambda: base.Language(tied), {}, {}),
    "clipped": (lambda: base.Language(even), {}, {"gradient_clip_val": 0.1}),
    "replicas": (lambda: base.Language(even), {"num_replicas": 2}, {"gradient_clip_val": 0.1}),
    "own plan": (lambda: base.Vectors(plain), {"tensor_parallel_plan": PLAN}, {}),
}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    base.num_tensor = 2
    results: dict[str, Any] = {}
    for name, (make, settings, kw) in CASES.items():
        results[name] = base.fit(out, FSDP2Strategy(tensor_parallel_size=2, **settings), make, **kw)

    pieces: dict[str, int] = {}

    class Pieces(base.Save):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pieces.update({name: local(p).numel() for name, p in pl_module.named_parameters()})

    make = CASES["llama"][0]
    for form in ("sharded", "full"):
        settings = {"tensor_parallel_size": 2, "save_distributed_checkpoint": form == "sharded"}
        path = out / f"{form}.ckpt"
        results[form] = base.fit(out, FSDP2Strategy(**settings), make, Pieces(path))
        results[f"{form}/resumed"] = base.fit(out, FSDP2Strategy(**settings), make, ckpt=path, seed=6)
        # each two of them still see the same data, which leaves the mean as it is
        results[f"{form}/data only"] = base.fit(out, FSDP2Strategy(), make, ckpt=path, seed=6)
    results["pieces"] = pieces

    def attempt(make: Any, size: int = 2, **settings: Any) -> str:
        return base.raised(lambda: base.fit(out, FSDP2Strategy(tensor_parallel_size=size, **settings), make))

    results["no plan"] = attempt(lambda: base.Language(base.gpt2))
    results["heads"] = attempt(lambda: base.Language(even), 4)
    results["nothing"] = attempt(lambda: base.Vectors(plain), tensor_parallel_plan={"model.7": "colwise"})
    results["style"] = attempt(lambda: base.Vectors(plain), tensor_parallel_plan={"model.0": "colwize"})
    results["layer"] = attempt(lambda: base.Vectors(plain), tensor_parallel_plan={"model.1": "colwise"})
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
