"""FLOPs of one step under each method, as a ratio to full fine-tuning, beside the arithmetic of what must be computed.

A 16-layer Llama; counted with PyTorch's FlopCounterMode in real Trainer steps, the mean over the draws of the run. The
arithmetic is (1 + q + p) / 3 of the matrix products: q is the share of activation gradients that must be computed to
reach the lowest trainable tensor, p the share of weight gradients.

    python -m benchmarks.method_flops
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.harness import DecoderShape, Variant, environment, exact_cost, quiet_lightning, write_json
from lightning_peft import HFT, IST, LISA, BAdam, EmbeddingsAndHead, LastLayer, RandomTuning, Telly

SHAPE = DecoderShape(num_layers=16, width=64, ffn_width=176, vocab_size=256, batch_size=2, num_tokens=32)
DRAWS = 64
ALWAYS = ("embeddings", "head", "norms")


def variants() -> dict[str, tuple[Variant, str]]:
    """Return each method with the arithmetic it is held against: how far back, how many weights."""
    layers = SHAPE.num_layers
    return {
        "LISA(2)": (Variant(lambda: [LISA(2, 1)]), f"q = 1, p = 2/{layers} + head"),
        "LISA(2), embeddings frozen": (Variant(lambda: [LISA(2, 1, always=("head", "norms"))]), "q to the lower block"),
        "IST(0.25) over blocks": (
            Variant(lambda: [IST(0.25, 1, 10**6, scope="blocks", always=ALWAYS)]),
            "q = 1, p = 1/4 + head",
        ),
        "BAdam, mean over blocks": (Variant(lambda: [BAdam("ascending", period_steps=1)]), "q = (L+1)/2L, p = 1/L"),
        "HFT(0.5)": (Variant(lambda: [HFT(redraw=1)]), "q = 1, p = 1/2 + head"),
        "Telly(8)": (Variant(lambda: [Telly(layers // 2)]), "q = p = 1/2, head"),
        "LastLayer(2) + head": (Variant(lambda: [LastLayer(2, always=("head", "norms"))]), "q = p = 2/L, head"),
        "EmbeddingsAndHead": (Variant(lambda: [EmbeddingsAndHead()]), "q = 1, p = head"),
        "RandomTuning(0.1)": (Variant(lambda: [RandomTuning(0.1, redraw=1)]), "q to the lowest tensor, p = 0.1"),
    }


def arithmetic(name: str) -> float:
    """Return the ratio that must be spent: matrix products of the blocks and of the head, nothing else."""
    d, f, layers = SHAPE.width, SHAPE.ffn_width, SHAPE.num_layers
    block, head = 4 * d * d + 3 * d * f, d * SHAPE.vocab_size
    forward = layers * block + head
    one = 1 / layers

    def total(q_blocks: float, p_blocks: float, head_trains: bool) -> float:
        """Activation gradients of a share of the blocks, their weight gradients, and the head's two.

        The lowest active block needs the gradient of its own input too, because its first norm trains.
        """
        back = q_blocks * layers * block + head
        weights = p_blocks * layers * block + (head if head_trains else 0)
        return (forward + back + weights) / (3 * forward)

    pairs = [(a, b) for a in range(layers) for b in range(layers) if a != b]
    passed = statistics.mean(layers - min(pair) for pair in pairs)  # blocks from the lower one of two up
    return {
        "LISA(2)": total(1, 2 * one, True),
        "LISA(2), embeddings frozen": total(passed * one, 2 * one, True),
        "IST(0.25) over blocks": total(1, 0.25, True),
        "BAdam, mean over blocks": total((layers + 1) / (2 * layers), one, False),
        "HFT(0.5)": total(1, 0.5, True),
        "Telly(8)": total(0.5, 0.5, True),
        "LastLayer(2) + head": total(2 * one, 2 * one, True),
        "EmbeddingsAndHead": total(1, 0, True),
        "RandomTuning(0.1)": total(1, 0.1, False),
    }[name]


def main(args: Sequence[str] | None = None) -> int:
    """Count, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="optimizer steps, each with a draw of its own")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "method_flops.json")
    options = parser.parse_args(args)
    quiet_lightning()
    full = exact_cost(Variant(), SHAPE, 1)[0]
    rows = []
    table = Table("method", "FLOPs / full", "arithmetic", "lowest", "highest", "what the arithmetic says")
    for name, (variant, formula) in variants().items():
        ratios = [step.flops / full.flops for step in exact_cost(variant, SHAPE, options.draws)]
        mean, needed = statistics.mean(ratios), arithmetic(name)
        rows.append(
            {"method": name, "ratio": mean, "arithmetic": needed, "lowest": min(ratios), "highest": max(ratios)}
        )
        table.add_row(name, f"{mean:.3f}", f"{needed:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", formula)
    Console().print(table)
    write_json(
        options.output,
        {
            "what": "FLOPs of one step of each method, ratio to full fine-tuning, mean over draws",
            **environment("method_flops", args),
            "shape": SHAPE,
            "draws": options.draws,
            "rows": rows,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
