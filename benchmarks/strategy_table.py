"""Which methods are exact under which strategy: the table of docs/strategies.md, from runs on two processes.

    python -m benchmarks.strategy_table

Takes about seven minutes on two CPU cores. Runs the probes of ``tests/distributed`` (tiny Llama, gloo) and compares
the gradients of each optimizer step with one process on the joined batch, weights after a resume with the
uninterrupted run, and the sets that train. Writes ``benchmarks/results/strategies.json`` and the table between the
marks in the guide.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.contract.harness import ROWS
from tests.distributed import ddp_probe, fsdp_probe
from tests.distributed.launch import launch

RESULTS = Path(__file__).parent / "results"
GUIDE = Path(__file__).parents[1] / "docs" / "strategies.md"
BEGIN, END = "<!-- table begin -->", "<!-- table end -->"

FAMILIES: dict[str, str] = {
    "LISA, state dropped": "lisa",
    "LISA, state kept": "lisa_keep",
    "LISA, state offloaded": "lisa_offload",
    "LISA, outlier sampling": "lisa_outliers",
    "HFT": "hft",
    "HFT, drawn again": "hft_redraw",
    "IST": "ist_slow",
    "BAdam": "badam",
    "GreenTrainer": "green_trainer",
    "Telly": "telly",
    "BitFit": "bitfit",
    "RandomTuning, drawn again": "random_tuning_redraw",
    "GradualUnfreezing": "gradual_unfreezing",
    "FinetuningSchedule": "schedule",
    "FinetuningSchedule, optimizers replaced": "schedule_replacing",
    "Spectrum": "spectrum",
    "Surgical": "surgical",
    "AutoRGN": "auto_rgn",
    "RiFT": "rift",
    "DropBP": "dropbp",
    "CoFiTune, soft mask": "cofitune",
    "CoFiTune, coarse": "cofitune_coarse",
    "two methods": "two_methods",
    "IST over LoRA": "ist_over_lora",
    "LoRA, LISA and head": "lora_and_lisa",
}
STRATEGIES = {"ddp": "DDP", "fsdp1": "FSDP1", "model_parallel": "FSDP2, stock", "fsdp2": "FSDP2Strategy"}


def largest_difference(ours: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of a gradient over all steps; infinite if other tensors have one, or other sets train."""
    if ours["histories"] != expected["histories"] or len(ours["gradients"]) != len(expected["gradients"]):
        return float("inf")
    worst = 0.0
    for left, right in zip(ours["gradients"], expected["gradients"], strict=True):
        if left.keys() != right.keys():
            return float("inf")
        worst = max([worst, *(float((left[name] - right[name]).abs().max()) for name in left)])
    return worst


def same_weights(ours: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether all weights are equal bit for bit."""
    left, right = ours["weights"], expected["weights"]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def look_up(strategy: str, row: str, ranks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """What both ranks recorded of a row, and why it was refused, if it was."""
    keys = {"ddp": [f"{row}/2", f"adapters/{row}"]}.get(strategy, [row, f"adapters/{row}"])
    for key in keys:
        if all(key in rank for rank in ranks):
            return [rank[key] for rank in ranks], ""
    return [], str(ranks[0].get(f"refused/{row}", ""))


def resumes(strategy: str, row: str, ranks: list[dict[str, Any]]) -> dict[str, bool]:
    """Form of checkpoint -> whether every resume from one was exact."""
    found: dict[str, bool] = {}
    prefixes = {"ddp": {"full": "resume/"}}.get(strategy, {"sharded": "resume/sharded/", "full": "resume/full/"})
    for form, prefix in {**prefixes, "bf16-mixed": "resume/mixed/"}.items():
        for rank in ranks:
            expected = rank.get(f"{prefix}{row}/expected")
            for key in [k for k in rank if k.startswith(f"{prefix}{row}/") and not k.endswith("expected")]:
                found[form] = found.get(form, True) and same_weights(rank[key], expected)
    if strategy == "ddp" and f"mixed/{row}/5" in ranks[0]:
        found["bf16-mixed"] = all(same_weights(rank[f"mixed/{row}/5"], rank[f"mixed/{row}"]) for rank in ranks)
    return found


def measure() -> list[dict[str, Any]]:
    """Run all probes and judge every cell."""
    cells = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        references: dict[str, dict[str, Any]] = {}
        for strategy in STRATEGIES:
            out = Path(folder) / strategy
            out.mkdir()
            probe = ddp_probe if strategy == "ddp" else fsdp_probe
            launch(Path(probe.__file__), str(out), *([] if strategy == "ddp" else [strategy]))
            ranks = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
            for family, row in FAMILIES.items():
                recorded, refused = look_up(strategy, row, ranks)
                cell: dict[str, Any] = {"family": family, "strategy": strategy, "refused": refused}
                if recorded:
                    clip = {} if strategy == "ddp" else {"gradient_clip_val": None}
                    key = f"{row} {clip}"
                    if key not in references:
                        references[key] = reference(Path(folder), row, clip)
                    cell["gradient_difference"] = max(largest_difference(rank, references[key]) for rank in recorded)
                    cell["ranks_equal"] = same_weights(*recorded)
                    cell["resumes"] = resumes(strategy, row, ranks)
                    mixed = [rank.get(f"mixed/{row}") for rank in ranks]
                    if all(mixed):
                        cell["mixed_same_set"] = all(each["histories"] == recorded[0]["histories"] for each in mixed)
                cells.append(cell)
    return cells


def reference(folder: Path, row: str, clip: dict[str, Any]) -> dict[str, Any]:
    """The same run on one process with the joined batch."""
    if row in fsdp_probe.ADAPTER_ROWS:
        return fsdp_probe.single(folder, fsdp_probe.ADAPTER_ROWS[row](), adapters=True)
    return ddp_probe.fit(folder, ROWS[row].make(), **clip)


def shown(cell: dict[str, Any]) -> str:
    """One cell of the table."""
    if cell["refused"]:
        return "refused: " + ("state='offload'" if "offload" in cell["refused"] else "reads whole weights or gradients")
    if "gradient_difference" not in cell:
        return "not compared: each process draws its own dropout"
    if not (cell["gradient_difference"] <= 1e-6 and cell["ranks_equal"] and all(cell["resumes"].values())):
        return f"WRONG ({cell['gradient_difference']:.0e})"
    resumed = ", ".join(cell["resumes"])
    return "exact" + (f"; resume {resumed}" if resumed else "") + ("; bf16" if cell.get("mixed_same_set") else "")


def table(cells: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = ["| method | " + " | ".join(STRATEGIES.values()) + " |", "|---" * (len(STRATEGIES) + 1) + "|"]
    for family in FAMILIES:
        row = {cell["strategy"]: shown(cell) for cell in cells if cell["family"] == family}
        lines.append(f"| {family} | " + " | ".join(row[strategy] for strategy in STRATEGIES) + " |")
    return "\n".join(lines)


def main() -> None:
    cells = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "strategies.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    text = GUIDE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    GUIDE.write_text(f"{head}{BEGIN}\n{table(cells)}\n{END}{tail}", encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
