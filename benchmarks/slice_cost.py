"""What training columns of weights costs: step time, operations and bytes, beside full fine-tuning and ``peft``.

An 8-layer Llama (width 256, 7.3 M parameters, 4 x 128 tokens, AdamW) is fine-tuned through real Trainers in lock-step,
see `benchmarks/harness.py`: as a whole, by PaCA, and by LoRA and MiSS as ``peft`` computes them, with equal numbers of
trainable parameters. Exit code 1: a requirement does not hold.

    python -m benchmarks.slice_cost
    python -m benchmarks.slice_cost --rounds 2 --tiny --output try.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.harness import (
    DecoderModule,
    DecoderShape,
    ExactCost,
    Variant,
    bar,
    environment,
    exact_cost,
    mib,
    paired_ratio,
    quiet_lightning,
    run_lanes,
    share_one_heap,
    write_json,
)
from lightning_peft import PaCA

RANK = 16
WARMUP = 2
RESULTS = Path(__file__).parent / "results"


class PeftModule(DecoderModule):
    """The decoder with adapters that ``peft`` alone puts in; AdamW over what trains.

    Args:
        shape: Shape of the model.
        config: A configuration of ``peft``.
    """

    def __init__(self, shape: DecoderShape, config: Any) -> None:
        super().__init__(shape)
        from peft import get_peft_model

        self.model = get_peft_model(self.model, config)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters that train."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def widths(shape: DecoderShape) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block."""
    hidden, ffn = shape.width, shape.ffn_width
    return [(hidden, hidden)] * 4 + [(hidden, ffn)] * 2 + [(ffn, hidden)]


def rank_of_as_many_parameters(shape: DecoderShape, lora_rank: int) -> int:
    """Columns per layer with which PaCA trains as many parameters as LoRA of a rank, or a few less."""
    return lora_rank * sum(i + o for i, o in widths(shape)) // sum(o for _, o in widths(shape))


def floor(shape: DecoderShape, rank: int) -> float:
    """Least matrix products of a step that trains ``rank`` columns of each layer, per those of full fine-tuning.

    Forward, the gradient of every layer's input but the first three's, and of the columns. Without the attention core.
    """
    block = sum(i * o for i, o in widths(shape))
    forward = shape.num_layers * block + shape.width * shape.vocab_size
    columns = shape.num_layers * rank * sum(o for _, o in widths(shape))
    return (2 * forward - 3 * shape.width**2 + columns) / (3 * forward)


def variants(shape: DecoderShape) -> dict[str, Variant]:
    """Return what is measured, the baseline and its copy first."""
    from peft import LoraConfig, MissConfig

    rank = min(RANK, shape.width // 2)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    miss = MissConfig(r=rank, target_modules="all-linear")
    equal = rank_of_as_many_parameters(shape, rank)
    return {
        "full": Variant(note="full fine-tuning, the baseline"),
        "full again": Variant(note="the baseline once more: how far to trust the numbers"),
        "LoRA, peft": Variant(module=lambda: PeftModule(shape, lora), note=f"r={rank}, all linear layers of blocks"),
        "MiSS, peft": Variant(module=lambda: PeftModule(shape, miss), note=f"r={rank}, all linear layers of blocks"),
        "PaCA": Variant(lambda: [PaCA(rank)], note=f"{rank} columns: as many parameters as MiSS"),
        "PaCA, as LoRA": Variant(lambda: [PaCA(equal)], note=f"{equal} columns: as many parameters as LoRA"),
    }


def measure(shape: DecoderShape, rounds: int) -> dict[str, Any]:
    """Return operations, bytes and step times of all variants, and their ratios to full fine-tuning."""
    lanes = run_lanes(variants(shape), shape, rounds=rounds, warmup=WARMUP)
    rows: dict[str, Any] = {}
    for name, variant in variants(shape).items():
        steps = exact_cost(variant, shape, 2)
        counts = {key: statistics.fmean(getattr(step, key) for step in steps) for key in ExactCost.__dataclass_fields__}
        times = {
            clock: paired_ratio(*([getattr(turn, clock) for turn in lanes[each].turns] for each in (name, "full")))
            for clock in ("cpu_seconds", "wall_seconds")
        }
        rows[name] = {"note": variant.note, **counts, "step_ratio": times}
    for row in rows.values():
        row["flops_ratio"] = row["flops"] / rows["full"]["flops"]
        row["activation_ratio"] = row["activation_bytes"] / rows["full"]["activation_bytes"]
    rank = min(RANK, shape.width // 2)
    rows["PaCA"]["floor"] = floor(shape, rank)
    rows["PaCA, as LoRA"]["floor"] = floor(shape, rank_of_as_many_parameters(shape, rank))
    return rows


def check(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the requirements and whether they hold."""
    time = {name: row["step_ratio"]["cpu_seconds"].median for name, row in rows.items()}
    kept = {name: row["activation_bytes"] for name, row in rows.items()}
    return [
        bar("full again within 2 % of full (CPU time)", abs(time["full again"] - 1), 0.02),
        bar("PaCA's FLOPs / their floor", rows["PaCA"]["flops_ratio"] / rows["PaCA"]["floor"], 1.0001),
        bar("PaCA's time / its floor", time["PaCA"] / rows["PaCA"]["floor"], 1.10),
        bar("PaCA's time / peft LoRA's, equal parameters", time["PaCA, as LoRA"] / time["LoRA, peft"], 0.85),
        bar("PaCA's time / peft MiSS's, equal parameters", time["PaCA"] / time["MiSS, peft"], 1.0),
        bar("PaCA's activations / peft LoRA's", kept["PaCA, as LoRA"] / kept["LoRA, peft"], 0.8),
        bar("PaCA's activations / peft MiSS's", kept["PaCA"] / kept["MiSS, peft"], 1.0),
    ]


def table(rows: dict[str, Any]) -> Table:
    """Return the rows as a table."""
    result = Table(title="One step beside full fine-tuning", title_justify="left")
    headings = ("variant", "parameters", "FLOPs / full", "activations, MiB", "/ full", "optimizer, MiB")
    for heading in (*headings, "CPU time / full", "wall time / full"):
        result.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, row in rows.items():
        cpu, wall = (row["step_ratio"][clock] for clock in ("cpu_seconds", "wall_seconds"))
        result.add_row(
            name,
            f"{row['trainable_parameters']:.0f}",
            f"{row['flops_ratio']:.3f}",
            mib(row["activation_bytes"]),
            f"{row['activation_ratio']:.3f}",
            mib(row["optimizer_bytes"]),
            f"{cpu.median:.3f} [dim]{cpu.quartiles[0]:.3f}-{cpu.quartiles[1]:.3f}[/dim]",
            f"{wall.median:.3f}",
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the result file; return 1 if a requirement does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=24, help="measured rounds of one step per variant")
    parser.add_argument("--tiny", action="store_true", help="a model of milliseconds: tries the script, judges nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "slice_cost.json", help="result file")
    options = parser.parse_args(arguments)
    quiet_lightning()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft
    shape = DecoderShape.tiny() if options.tiny else DecoderShape()
    result: dict[str, Any] = {
        "what": "training columns of weights, beside full fine-tuning and peft in the same process",
        **environment("slice_cost", arguments),
        "threads": 1,
        "one_heap_for_all_threads": share_one_heap(),
        "rounds": options.rounds,
        "warmup_rounds": WARMUP,
        "tiny": options.tiny,
        "shape": shape,
        "rows": measure(shape, options.rounds),
    }
    result["bars"] = None if options.tiny else check(result["rows"])
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(result["rows"]))
    for each in result["bars"] or ():
        console.print(f"{each['bar']}: {each['value']:.3f} (limit {each['limit']:g})")
    write_json(options.output, result)
    console.print(f"written: {options.output}", soft_wrap=True)
    return 0 if result["bars"] is None or all(each["holds"] for each in result["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
