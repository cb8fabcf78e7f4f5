"""What one optimizer step of LISA and HFT costs beside full fine-tuning, in time, operations and bytes.

An 8-layer Llama (width 256, 7.3 M parameters, 4 x 128 tokens, fp32, AdamW) is fine-tuned through real Trainers in
lock-step, see `benchmarks/harness.py`. Exit code 1: a requirement does not hold.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --rounds 2 --tiny --output try.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.harness import (
    DecoderShape,
    ExactCost,
    Lane,
    Ratio,
    Variant,
    bar,
    environment,
    exact_cost,
    hook_costs,
    mib,
    paired_ratio,
    quiet_lightning,
    run_lanes,
    share_one_heap,
    write_json,
)
from benchmarks.peers import KeptStateLISA
from lightning_peft import HFT, LISA

NUM_LAYERS = 2
PERIOD_STEPS = 20  # LISA's default, for which costs are stated
NUM_SWITCHES = 12
WARMUP = 2
RESULTS = Path(__file__).parent / "results"


def timed_variants(period_steps: int, num_blocks: int) -> dict[str, Variant]:
    """Return what is timed, the baseline and its copy first."""
    return {
        "full": Variant(note="full fine-tuning, the baseline"),
        "full again": Variant(note="the baseline once more: how far to trust the numbers"),
        "LISA": Variant(lambda: [LISA(NUM_LAYERS, period_steps)], note=f"{NUM_LAYERS} blocks, state dropped"),
        "HFT": Variant(lambda: [HFT()], note="category half"),
        "LISA of all": Variant(
            lambda: [LISA(num_blocks, period_steps)], note="trains everything: full fine-tuning plus the callback"
        ),
        "LMFlow shape": Variant(lambda: [KeptStateLISA(NUM_LAYERS, period_steps)], note="peer: LISA, state kept"),
    }


def counted_variants() -> dict[str, Variant]:
    """Return what is counted; periods of one step, so that each step is another draw."""
    return {
        "full": Variant(),
        "LISA": Variant(lambda: [LISA(NUM_LAYERS, 1)]),
        "HFT": Variant(lambda: [HFT()]),
        "LMFlow shape": Variant(lambda: [KeptStateLISA(NUM_LAYERS, 1)]),
    }


def time_ratios(lane: Lane, full: Lane) -> dict[str, Any]:
    """Return the ratios of a lane to full fine-tuning, by clock, with and without the steps that draw."""
    draws = [lane.is_draw(turn) for turn in lane.turns]
    result: dict[str, Any] = {"draws_timed": sum(draws)}
    for clock in ("cpu_seconds", "wall_seconds"):
        own, base = ([getattr(turn, clock) for turn in each.turns] for each in (lane, full))
        every = paired_ratio(own, base)
        plain = paired_ratio(own, base, [not drawn for drawn in draws]) if not all(draws) else every
        drawn = paired_ratio(own, base, draws) if any(draws) else plain
        result[clock] = {
            "median_seconds": statistics.median(own),
            "all_steps": every,
            "steps_without_draw": plain,
            "steps_with_draw": drawn,
            # a draw's step also fills the fresh optimizer state of the blocks that wake
            "at_stated_period": plain.median + (drawn.median - plain.median) / PERIOD_STEPS,
            "of_each_draw": ratios_of_draws(lane, own, base),
        }
    return result


def ratios_of_draws(lane: Lane, own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the median ratio within each draw, without its first step: shows whether the cost depends on the draw."""
    groups: list[list[float]] = []
    for turn, value, reference in zip(lane.turns, own, base, strict=True):
        if lane.is_draw(turn):
            groups.append([])
        elif groups:
            groups[-1].append(value / reference)
    return [statistics.median(group) for group in groups if group]


def time_steps(shape: DecoderShape, rounds: int, period_steps: int) -> dict[str, Any]:
    """Time all variants in lock-step."""
    variants = timed_variants(period_steps, shape.num_layers)
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("rounds", total=WARMUP + rounds)
        lanes = run_lanes(
            variants,
            shape,
            rounds=rounds,
            warmup=WARMUP,
            progress=lambda done: progress.update(task, completed=done, refresh=True),
        )
    full = lanes["full"]
    times = {name: {"note": variants[name].note, **time_ratios(lane, full)} for name, lane in lanes.items()}
    hooks = {
        name: hook_costs(lanes[name], full, PERIOD_STEPS) for name in ("LISA", "HFT", "LISA of all", "LMFlow shape")
    }
    return {"times": times, "hooks": hooks}


def count_steps(shape: DecoderShape, num_steps: int) -> dict[str, Any]:
    """Count operations and bytes of all variants; means over steps, which for LISA are as many draws."""
    result: dict[str, Any] = {}
    for name, variant in counted_variants().items():
        steps = exact_cost(variant, shape, num_steps)
        mean: dict[str, Any] = {
            key: statistics.fmean(getattr(step, key) for step in steps) for key in ExactCost.__dataclass_fields__
        }
        mean["flops_of_draws"] = sorted({step.flops for step in steps})
        result[name] = mean
    for name, counts in result.items():
        counts["flop_ratio"] = counts["flops"] / result["full"]["flops"]
        counts["activation_ratio"] = counts["activation_bytes"] / result["full"]["activation_bytes"]
        result[name] = counts
    return result


def state_after_switches(shape: DecoderShape) -> dict[str, list[int]]:
    """Return the optimizer's bytes after the first draw and after each of 12 switches; one short row per step."""
    short = DecoderShape(**{**shape.__dict__, "batch_size": 1, "num_tokens": 8})
    variants = {
        "full": Variant(),
        "LISA, drop": Variant(lambda: [LISA(NUM_LAYERS, 1, state="drop")]),
        "LISA, keep": Variant(lambda: [LISA(NUM_LAYERS, 1, state="keep")]),
        "LMFlow shape": Variant(lambda: [KeptStateLISA(NUM_LAYERS, 1)]),
    }
    return {
        name: [step.optimizer_bytes for step in exact_cost(variant, short, NUM_SWITCHES + 1)]
        for name, variant in variants.items()
    }


def check(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the requirements and whether they hold."""
    times, hooks, state = result["times"], result["hooks"], result["optimizer_bytes_after_switches"]
    bars = []
    for clock, word in (("cpu_seconds", "CPU time"), ("wall_seconds", "wall time")):
        self_pair = abs(times["full again"][clock]["all_steps"].median - 1)
        bars += [
            bar(f"full again within 2 % of full ({word})", self_pair, 0.02),
            bar(f"LISA's step / full's ({word})", times["LISA"][clock]["at_stated_period"], 0.81),
            bar(f"HFT's step / full's ({word})", times["HFT"][clock]["all_steps"].median, 0.89),
        ]
    bars += [
        bar(f"hooks of {name}, fraction of a step", hooks[name]["fraction_of_step"], 0.01)
        for name in ("LISA of all", "LISA", "HFT")
    ]
    dropped = state["LISA, drop"]
    bars.append(bar(f"LISA's optimizer bytes, max - min over {NUM_SWITCHES} switches", max(dropped) - min(dropped), 0))
    return bars


# ---------------------------------------------------------------------------------------------------- tables


def ratio_text(ratio: Ratio) -> str:
    """Return a median with its quartiles."""
    return f"{ratio.median:.3f} [dim]{ratio.quartiles[0]:.3f}-{ratio.quartiles[1]:.3f}[/dim]"


def time_table(result: Mapping[str, Any]) -> Table:
    """Return the ratios by clock."""
    table = Table(title="Step time, ratio to full fine-tuning: median and quartiles", title_justify="left")
    for heading in ("variant", "CPU time", "wall time", f"CPU at K={PERIOD_STEPS}", "draws", "FLOPs", "ms"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, times in result["times"].items():
        cpu, wall = times["cpu_seconds"], times["wall_seconds"]
        flops = result["counts"].get(name)
        table.add_row(
            name,
            ratio_text(cpu["all_steps"]),
            ratio_text(wall["all_steps"]),
            f"{cpu['at_stated_period']:.3f}",
            str(times["draws_timed"]),
            f"{flops['flop_ratio']:.3f}" if flops else "",
            f"{1000 * wall['median_seconds']:.1f}",
        )
    return table


def hook_table(result: Mapping[str, Any]) -> Table:
    """Return what the callbacks' hooks cost."""
    table = Table(
        title=f"Time in callback and optimizer hooks (one draw per {PERIOD_STEPS} steps)", title_justify="left"
    )
    for heading in ("variant", "a step, µs", "a draw, ms", "first step, ms", "of a step", "of it: draws"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, cost in result["hooks"].items():
        table.add_row(
            name,
            f"{1e6 * cost['plain_seconds']:.0f}",
            f"{1e3 * cost['draw_seconds']:.2f}",
            f"{1e3 * cost['first_step_seconds']:.2f}",
            f"{cost['fraction_of_step']:.3%}",
            f"{cost['draw_fraction']:.3%}",
        )
    return table


def count_table(result: Mapping[str, Any]) -> Table:
    """Return operations and bytes."""
    table = Table(title="Counted per step (MiB)", title_justify="left")
    for heading in ("variant", "FLOPs / full", "activations", "gradients", "optimizer", "parameters that train"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    state = result["optimizer_bytes_after_switches"]
    last = {"LISA": state["LISA, drop"][-1], "LMFlow shape": state["LMFlow shape"][-1]}
    for name, counts in result["counts"].items():
        table.add_row(
            name,
            f"{counts['flop_ratio']:.3f}",
            mib(counts["activation_bytes"]),
            mib(counts["gradient_bytes"]),
            mib(last.get(name, counts["optimizer_bytes"])),
            f"{counts['trainable_parameters']:,.0f}",
        )
    table.caption = f"optimizer state of LISA and its peer: after {NUM_SWITCHES} switches"
    return table


def state_table(result: Mapping[str, Any]) -> Table:
    """Return the growth of the optimizer state."""
    table = Table(title="Optimizer state after each switch (MiB)", title_justify="left")
    table.add_column("variant")
    for switch in range(NUM_SWITCHES + 1):
        table.add_column(str(switch) if switch else "start", justify="right")
    for name, sizes in result["optimizer_bytes_after_switches"].items():
        table.add_row(name, *map(mib, sizes))
    return table


def bar_table(bars: Sequence[Mapping[str, Any]]) -> Table:
    """Return the requirements."""
    table = Table(title="Requirements", title_justify="left")
    for heading in ("what", "value", "limit", ""):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for each in bars:
        verdict = "[green]holds[/green]" if each["holds"] else "[red]does not hold[/red]"
        table.add_row(each["bar"], f"{each['value']:g}", f"{each['limit']:g}", verdict)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the result file; return 1 if a requirement does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=48, help="measured rounds of one step per variant")
    parser.add_argument("--period", type=int, default=4, help="LISA's period while timing, short to cover many draws")
    parser.add_argument("--tiny", action="store_true", help="a model of milliseconds: tries the script, judges nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_cost.json", help="result file")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.period < 1:
        parser.error("--rounds and --period must be at least 1")
    quiet_lightning()
    shape = DecoderShape.tiny() if options.tiny else DecoderShape()
    result: dict[str, Any] = {
        "what": "cost of one optimizer step, beside full fine-tuning in the same process",
        **environment("step_cost", arguments),
        "threads": 1,
        "one_heap_for_all_threads": share_one_heap(),
        "rounds": options.rounds,
        "warmup_rounds": WARMUP,
        "timed_period_steps": options.period,
        "stated_period_steps": PERIOD_STEPS,
        "tiny": options.tiny,
        "shape": shape,
    }
    result.update(time_steps(shape, options.rounds, options.period))
    result["counts"] = count_steps(shape, num_steps=4)
    result["optimizer_bytes_after_switches"] = state_after_switches(shape)
    result["bars"] = None if options.tiny else check(result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (time_table, hook_table, count_table, state_table):
        console.print(table(result))
    if result["bars"] is not None:
        console.print(bar_table(result["bars"]))
    write_json(options.output, result)
    console.print(f"written: {options.output}", soft_wrap=True)
    return 0 if result["bars"] is None or all(each["holds"] for each in result["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
