"""FLOPs of one step under each method, as a ratio to full fine-tuning, beside the arithmetic of what must be computed.

A 16-layer Llama; counted with PyTorch's FlopCounterMode in real Trainer steps, the mean over the steps of the run.
What a method spends on scoring, before a step, is not in it. The arithmetic knows nothing of PyTorch: a product of two
tensors is computed once forward, and once more for each of the two whose gradient is needed, because it or
something before it trains. It is done on what was trainable in each step.

    python -m benchmarks.method_flops
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.harness import (
    DecoderBatches,
    DecoderModule,
    DecoderShape,
    StepCounter,
    environment,
    make_trainer,
    quiet_lightning,
    write_json,
)
from lightning_peft import (
    HFT,
    IST,
    LISA,
    AutoRGN,
    BAdam,
    BitFit,
    CoFiTune,
    DropBP,
    EmbeddingsAndHead,
    FinetuningSchedule,
    GradualUnfreezing,
    GreenTrainer,
    LastLayer,
    RandomTuning,
    RiFT,
    Spectrum,
    Surgical,
    Telly,
)

SHAPE = DecoderShape(num_layers=16, width=64, ffn_width=176, vocab_size=256, batch_size=2, num_tokens=64)
DRAWS = 32
ALWAYS = ("embeddings", "head", "norms")
PHASES: dict[int, Any] = {
    0: {"params": ["head", "re:.*layers[.]1[2-5][.].*"], "max_steps": DRAWS // 4, "lr": 1e-4},
    1: {"only": ["re:.*layers[.]([4-9]|1[01])[.].*"], "max_steps": DRAWS // 4, "lr": 1e-4},
    2: {"only": ["all"], "lr": 1e-4},
}


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        make: Builds the callback.
        formula: How far back-propagation goes (q) and how many weight gradients there are (p), as shares.
        anchor: Ratio of an independent calculation on the same shape, where there is one.
        skips: Whether blocks that rest are left out of back-propagation altogether.
    """

    make: Callable[[], Callback]
    formula: str
    anchor: float | None = None
    skips: bool = False


def rows() -> dict[str, Row]:
    """Return each method with what is expected of it."""
    layers = SHAPE.num_layers
    fixed = "q to block 0 / 8 / 15, p = 1/L"
    held = 'score_on="train"'
    return {
        "LISA(2)": Row(lambda: LISA(2, 1), f"q = 1, p = 2/{layers} + head", 0.754),
        "LISA(2), embeddings frozen": Row(lambda: LISA(2, 1, always=("head", "norms")), "q to the lower block"),
        "LISA(2, outliers)": Row(lambda: LISA(2, 1, sampling="outliers", outlier_factor=3.0), "as LISA(2)", 0.754),
        "IST(0.25) over blocks": Row(
            lambda: IST(0.25, 1, 10**6, scope="blocks", always=ALWAYS), "q = 1, p = 1/4 + head"
        ),
        "BAdam, mean over blocks": Row(lambda: BAdam("ascending", period_steps=1), "q = (L+1)/2L, p = 1/L", 0.555),
        "BAdam, block 0": Row(lambda: BAdam("fixed", start_block=0), fixed, 0.730),
        "BAdam, block 8": Row(lambda: BAdam("fixed", start_block=8), fixed, 0.543),
        "BAdam, block 15": Row(lambda: BAdam("fixed", start_block=15), fixed, 0.380),
        "HFT(0.5)": Row(lambda: HFT(redraw=1), "q = 1, p = 1/2 + head", 0.859),
        "GreenTrainer(0.5)": Row(lambda: GreenTrainer(0.5, redraw=16), "at most 0.5"),
        "GreenTrainer(0.7)": Row(lambda: GreenTrainer(0.7, redraw=16), "at most 0.7"),
        "Telly(8)": Row(lambda: Telly(layers // 2), "q = p = 1/2, head", 0.672),
        "LastLayer(2) + head": Row(lambda: LastLayer(2, always=("head", "norms")), "q = p = 2/L, head", 0.427),
        "EmbeddingsAndHead": Row(lambda: EmbeddingsAndHead(), "q = 1, p = head"),
        "BitFit on norms": Row(lambda: BitFit(scope=["biases", "norms"]), "q = 1, p = 0"),
        "RandomTuning(0.1)": Row(lambda: RandomTuning(0.1, redraw=1), "q to the lowest tensor, p = 0.1"),
        "Spectrum(0.5)": Row(lambda: Spectrum(0.5), "q = 1, p = 1/2 of each kind + head"),
        "CoFiTune": Row(lambda: CoFiTune(soft_mask="none"), "q to block 4, p = up and down of 4 blocks"),
        "RiFT": Row(
            lambda: RiFT(epochs=1, num_batches=1, interpolation_steps=0, score_on="train"),
            f"q to the module, p = the module ({held})",
        ),
        "Surgical(0, 4)": Row(lambda: Surgical(0, 4), "q = 1, p = 1/4"),
        "Surgical(3, 4)": Row(lambda: Surgical(3, 4), "q = p = 1/4"),
        "AutoRGN": Row(lambda: AutoRGN(num_batches=1), "q = p = 1"),
        "DropBP(0.5)": Row(lambda: DropBP(0.5), "q = p = 1/2 + head", skips=True),
        "GradualUnfreezing": Row(lambda: GradualUnfreezing(period_steps=DRAWS // 16), "mean over 16 layers' thawing"),
        "FinetuningSchedule": Row(
            lambda: FinetuningSchedule(PHASES), "top 1/4, middle 1/2, all: 1/4, 1/4, 1/2 of steps"
        ),
    }


_ORDER = (
    ("input_layernorm",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("attention",),
    ("self_attn.o_proj",),
    ("post_attention_layernorm",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""What a block computes, one after the other; what stands together has the same input."""


def arithmetic(trainable: Collection[str], shape: DecoderShape = SHAPE, skips: bool = False) -> int:
    """Return the FLOPs of a step, forward and backward, when exactly these parameters train.

    Args:
        trainable: Names as in ``LlamaForCausalLM``.
        shape: Of model and batch.
        skips: Whether blocks without a trainable parameter are left out of back-propagation.
    """
    tokens = shape.batch_size * shape.num_tokens
    attention = 2 * 2 * shape.batch_size * shape.num_tokens**2 * shape.width
    modules = {name.removesuffix(".weight") for name in trainable}

    def product(part: str) -> int:
        wide = shape.ffn_width if part.startswith("mlp") else shape.width
        return 2 * tokens * shape.width * wide

    total = 0
    reached = "model.embed_tokens" in modules
    for layer in range(shape.num_layers):
        path = f"model.layers.{layer}"
        into = reached or f"{path}.input_layernorm" in modules  # the input of q, k and v needs a gradient
        passed_by = skips and not any(module.startswith(f"{path}.") for module in modules)
        for stage in _ORDER:
            for part in stage:
                if part == "attention":
                    every = into and not passed_by
                    q, k, v = (every or f"{path}.self_attn.{name}_proj" in modules for name in "qkv")
                    total += attention + attention // 2 * ((q or k) + v + q + k)  # of P in P v, of v, of q and k in q k
                elif "norm" not in part:
                    trains = f"{path}.{part}" in modules
                    total += product(part) * (1 + trains + (reached and not passed_by))
            reached |= any(f"{path}.{part}" in modules for part in stage)
    reached |= "model.norm" in modules
    head = 2 * tokens * shape.width * shape.vocab_size
    return total + head * (1 + ("lm_head" in modules) + reached)


class Trainable(Callback):
    """Names of what trains in each step, as the model has it."""

    def __init__(self) -> None:
        self.steps: list[frozenset[str]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Note what requires a gradient."""
        named = pl_module.model.named_parameters()
        self.steps.append(frozenset(name for name, parameter in named if parameter.requires_grad))


def measure(callbacks: Sequence[Callback], num_steps: int, shape: DecoderShape = SHAPE) -> list[tuple[int, Any]]:
    """Return ``(FLOPs, names that trained)`` of each step of a run; exact, and the same at every call."""
    torch.manual_seed(0)
    module = DecoderModule(shape)
    module.model.set_attn_implementation("eager")  # whose products FlopCounterMode counts on the CPU too
    counter, names = StepCounter(), Trainable()
    batches: Any = DataLoader(list(DecoderBatches(shape, num_steps)), batch_size=None)  # type: ignore[arg-type]
    make_trainer([*callbacks, names, counter], num_steps).fit(module, batches)
    return list(zip((step.flops for step in counter.steps), names.steps, strict=True))


def main(args: Sequence[str] | None = None) -> int:
    """Count, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="optimizer steps of each run")
    parser.add_argument("--only", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "method_flops.json")
    options = parser.parse_args(args)
    quiet_lightning()
    ((full, every),) = measure([], 1)
    whole = arithmetic(every)
    results = []
    table = Table("method", "FLOPs / full", "arithmetic", "anchor", "lowest", "highest", "what the arithmetic says")
    for name, row in rows().items():
        if options.only and name not in options.only:
            continue
        steps = measure([row.make()], options.draws)
        ratios = [flops / full for flops, _ in steps]
        needed = statistics.mean(arithmetic(names, skips=row.skips) / whole for _, names in steps)
        mean = statistics.mean(ratios)
        results.append(
            {
                "method": name,
                "ratio": mean,
                "arithmetic": needed,
                "anchor": row.anchor,
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
        anchor = "" if row.anchor is None else f"{row.anchor:.3f}"
        figures = [f"{value:.3f}" for value in (mean, needed)], [f"{value:.3f}" for value in (min(ratios), max(ratios))]
        table.add_row(name, *figures[0], anchor, *figures[1], row.formula)
    Console().print(table)
    write_json(
        options.output,
        {
            "what": "FLOPs of one step of each method, ratio to full fine-tuning, mean over the steps of a run",
            **environment("method_flops", args),
            "shape": SHAPE,
            "draws": options.draws,
            "rows": results,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
