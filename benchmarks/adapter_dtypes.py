"""What float32 adapters over a bfloat16 base cost: bytes kept for backward, and step time.

An 8-layer Llama in bfloat16 (width 256, 7.3 M parameters, 4 x 128 tokens, AdamW) is fine-tuned through real Trainers in
lock-step, see `benchmarks/harness.py`: as a whole, by adapters of this package, and by the same adapters as ``peft``
computes them. Exit code 1: a requirement does not hold.

    python -m benchmarks.adapter_dtypes
    python -m benchmarks.adapter_dtypes --rounds 2 --tiny --output try.json
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
from lightning_peft import AdaLoRA, DoRA, LoRA

RANK = 16
WARMUP = 2
RESULTS = Path(__file__).parent / "results"


class BFloat16Module(DecoderModule):
    """The decoder with bfloat16 weights; AdamW over what trains.

    Args:
        shape: Shape of the model.
        config: A configuration of ``peft`` to put in by ``peft`` alone.
        upcast: ``peft``'s ``autocast_adapter_dtype``: adapters in float32.
    """

    def __init__(self, shape: DecoderShape, config: Any = None, upcast: bool = True) -> None:
        super().__init__(shape)
        self.model.to(torch.bfloat16)
        if config is not None:
            from peft import get_peft_model

            self.model = get_peft_model(self.model, config, autocast_adapter_dtype=upcast)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters that train."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def variants(shape: DecoderShape) -> dict[str, Variant]:
    """Return what is measured, the baseline and its copy first."""
    from peft import AdaLoraConfig, LoraConfig

    def full() -> BFloat16Module:
        return BFloat16Module(shape)

    def peft(upcast: bool = True, **options: Any) -> Any:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **options)
        return lambda: BFloat16Module(shape, config, upcast)

    adalora = {"init_r": RANK, "target_r": RANK // 2, "total_step": 10_000, "target_modules": "all-linear"}
    rank = min(RANK, shape.width)
    return {
        "full": Variant(module=full, note="full fine-tuning, the baseline"),
        "full again": Variant(module=full, note="the baseline once more: how far to trust the numbers"),
        "LoRA": Variant(lambda: [LoRA(rank)], full, note="float32 adapters, computed in the activations' dtype"),
        "LoRA, peft": Variant(module=peft(), note="peft's default: float32 adapters, activations cast to float32"),
        "LoRA, peft, bfloat16 adapters": Variant(module=peft(upcast=False), note="autocast_adapter_dtype=False"),
        "DoRA": Variant(lambda: [DoRA(rank)], full, note="as LoRA"),
        "DoRA, peft": Variant(module=peft(use_dora=True), note="peft's default"),
        "AdaLoRA": Variant(lambda: [AdaLoRA(10_000, rank, rank // 2, orthogonality=0.0)], full, note="as LoRA"),
        "AdaLoRA, peft": Variant(
            module=lambda: BFloat16Module(shape, AdaLoraConfig(**adalora)), note="peft's default, ranks not allocated"
        ),
    }


def measure(shape: DecoderShape, rounds: int) -> dict[str, Any]:
    """Return bytes and step times of all variants, and their ratios to full fine-tuning."""
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
        row["activation_ratio"] = row["activation_bytes"] / rows["full"]["activation_bytes"]
    return rows


def check(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the requirements and whether they hold."""
    kept = {name: row["activation_bytes"] for name, row in rows.items()}
    return [
        bar(
            "full again within 2 % of full (CPU time)",
            abs(rows["full again"]["step_ratio"]["cpu_seconds"].median - 1),
            0.02,
        ),
        bar("LoRA's activations / full's", kept["LoRA"] / kept["full"], 1.0),
        *(
            bar(f"{name}'s activations / peft's", kept[name] / kept[f"{name}, peft"], 0.75)
            for name in ("LoRA", "DoRA", "AdaLoRA")
        ),
    ]


def table(rows: dict[str, Any]) -> Table:
    """Return the rows as a table."""
    result = Table(title="bfloat16 base: one step beside full fine-tuning", title_justify="left")
    for heading in ("variant", "activations, MiB", "/ full", "optimizer, MiB", "CPU time / full", "wall time / full"):
        result.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, row in rows.items():
        cpu, wall = (row["step_ratio"][clock] for clock in ("cpu_seconds", "wall_seconds"))
        result.add_row(
            name,
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
    parser.add_argument("--output", type=Path, default=RESULTS / "adapter_dtypes.json", help="result file")
    options = parser.parse_args(arguments)
    quiet_lightning()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft
    shape = DecoderShape.tiny() if options.tiny else DecoderShape()
    result: dict[str, Any] = {
        "what": "float32 adapters over a bfloat16 base, beside full fine-tuning and peft in the same process",
        **environment("adapter_dtypes", arguments),
        "threads": 1,
        "one_heap_for_all_threads": share_one_heap(),
        "rounds": options.rounds,
        "warmup_rounds": WARMUP,
        "rank": RANK,
        "tiny": options.tiny,
        "shape": shape,
        "rows": measure(shape, options.rounds),
    }
    result["bars"] = None if options.tiny else check(result["rows"])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(result["rows"]))
    for each in result["bars"] or ():
        console.print(f"{each['bar']}: {each['value']:.3f} (limit {each['limit']:g})")
    write_json(options.output, result)
    console.print(f"written: {options.output}", soft_wrap=True)
    return 0 if result["bars"] is None or all(each["holds"] for each in result["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
