"""Which adapters are exact on which model: the tables of docs/adapters.md, from runs.

    python -m benchmarks.adapter_table                 # everything, about half an hour on two CPU cores
    python -m benchmarks.adapter_table lora ssf        # these methods again; the other rows stay as they were

Every method is put into four small models (plain modules, a vision transformer, a Llama, a convolutional network with
BatchNorm), trained for six steps through ``Trainer``, validated and resumed from a checkpoint, exported and loaded by
``peft``, merged, trained on a 4-bit base, and trained on two processes (gloo) under DDP and FSDP2. A cell says what
came out. Writes ``benchmarks/results/adapters.json`` and the tables between the marks in the guide.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.adapter_methods import METHODS, MODELS, NATIVE
from lightning_peft import FSDP2Strategy, QuantizedPrecision, load_from_checkpoint, set_tasks
from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.native.mtlora import MTLoRALayer
from lightning_peft.core.names import clean_name
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import LightningPeftError

RESULTS = Path(__file__).parent / "results" / "adapters.json"
GUIDE = Path(__file__).parents[1] / "docs" / "adapters.md"
BEGIN, END = "<!-- table begin -->", "<!-- table end -->"
STEPS = ("inject", "train", "validate", "resume", "load", "export", "merge", "4-bit base", "DDP", "FSDP2")
NUM_STEPS, RESUME_AT, BATCH_SIZE = 6, 3, 4
STRATEGIES: dict[str, Callable[[], Any]] = {"DDP": lambda: "ddp", "FSDP2": FSDP2Strategy}


class Task(pl.LightningModule):
    """A user's module: its own optimizer, a loss over the model's output."""

    def __init__(self, kind: str, plain_optimizer: bool = False) -> None:
        super().__init__()
        self.kind, self.plain_optimizer = kind, plain_optimizer
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = MODELS[kind].build()
        self.gradients: list[dict[str, Tensor]] = []

    def loss(self, batch: Any) -> Tensor:
        x, y, _ = batch
        return nn.functional.cross_entropy(MODELS[self.kind].output(self.model, x).flatten(0, -2), y.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        found = {clean_name(n): p.grad for n, p in self.named_parameters() if p.grad is not None}
        self.gradients.append({n: whole(g) for n, g in found.items()})

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.plain_optimizer:  # Adam's first steps blow rounding errors of tiny gradients up
            return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class SaveAt(pl.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Late(pl.LightningDataModule):
    """Makes its loader when the processes are there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> ResumableDataLoader:
        return loader(self.kind)


class WholeWeights(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for block in pl_module.modules():
            if hasattr(block, "reshard"):
                block.reshard()  # type: ignore[operator]
        self.values = {clean_name(n): whole(p) for n, p in pl_module.named_parameters()}


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def loader(kind: str) -> ResumableDataLoader:
    """Inputs, targets and task ids; of each batch, every process has its part."""
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(*MODELS[kind].data(NUM_STEPS * BATCH_SIZE, generator))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return ResumableDataLoader(data, batch_size=BATCH_SIZE // world_size, shuffle=True, seed=3)


def quiet(folder: Path) -> dict[str, Any]:
    """Settings of every Trainer here."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    return {"default_root_dir": folder, "accelerator": "cpu", "devices": 1, **dict.fromkeys(off, False)}


def fit(
    folder: Path,
    kind: str,
    callbacks: list[Any],
    *more: Any,
    ckpt: Path | None = None,
    task: Task | None = None,
    **settings: Any,
) -> tuple[Task, pl.Trainer]:
    torch.manual_seed(11 if ckpt is None else 12)
    task = task or Task(kind)
    run = pl.Trainer(max_steps=NUM_STEPS, callbacks=[*callbacks, *more], **{**quiet(folder), **settings})
    run.fit(task, Late(kind), ckpt_path=ckpt)
    return task, run


def state(module: nn.Module) -> dict[str, Tensor]:
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    return {clean_name(n): t.detach().clone() for n, t in found.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def predict(task: nn.Module, kind: str) -> Tensor:
    from peft.tuners.poly.layer import PolyLayer

    x, _, ids = MODELS[kind].data(BATCH_SIZE, torch.Generator().manual_seed(4))
    task.eval()
    hooks = [
        module.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "task_ids": ids}), with_kwargs=True)
        for module in task.modules()
        if isinstance(module, PolyLayer)
    ]
    if any(isinstance(module, MTLoRALayer) for module in task.modules()):
        set_tasks(task, 1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = MODELS[kind].output(task.get_submodule("model"), x)
    for hook in hooks:
        hook.remove()
    return found


# ---------------------------------------------------------------------------------------------------- one process


class Probe:
    """One method in one model, step by step; each returns what the cell says."""

    def __init__(self, folder: Path, method: str, kind: str) -> None:
        self.folder, self.method, self.kind = folder, method, kind
        self.make: Callable[[], Adapter] = lambda: METHODS[method].make(kind)
        self.traits = METHODS[method]

    def run(self) -> dict[str, str]:
        if self.traits.only and self.kind not in self.traits.only[0]:
            return dict.fromkeys(STEPS[:8], f"n/a: {self.traits.only[1]}")
        cells: dict[str, str] = {}
        for step, probe in {
            "inject": self.inject,
            "train": self.train,
            "validate": self.validate,
            "resume": self.resume,
            "load": self.load,
            "export": self.export,
            "merge": self.merge,
            "4-bit base": self.quantised,
        }.items():
            try:
                cells[step] = probe()
            except LightningPeftError as error:
                cells[step] = f"refused: {error}"
            except Exception as error:  # what the table is to show
                cells[step] = f"ERROR: {type(error).__name__}: {error}"
            if step in ("inject", "train") and not cells[step].startswith("exact"):
                return {**cells, **dict.fromkeys(STEPS[len(cells) : 8], cells[step])}
        return cells

    def inject(self) -> str:
        """Nothing but what the method is for has changed, and the model computes what it did."""
        before = Task(self.kind)
        expected, values = predict(before, self.kind), state(before)
        task, adapter = Task(self.kind), self.make()
        run = pl.Trainer(callbacks=[adapter], max_steps=0, **quiet(self.folder))
        torch.manual_seed(11)
        run.fit(task, loader(self.kind))
        base = {original(name): value for name, value in state(task).items()}
        changed = [name for name, value in values.items() if name in base and not torch.equal(base[name], value)]
        if changed and not self.traits.changes_base:
            return f"WRONG: {changed[0]} has changed"
        difference = float((predict(task, self.kind) - expected).abs().max())
        if difference > 1e-4 and not self.traits.starts_elsewhere:
            return f"WRONG: the output has changed by {difference:.1g}"
        return "exact" if difference <= 1e-4 else "exact; starts beside the base"

    def train(self) -> str:
        """The set that trains is the set that has gradients and moves."""
        adapter, saver = self.make(), SaveAt(self.folder / "half.ckpt", RESUME_AT)
        started: dict[str, Tensor] = {}

        class Start(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                started.update(state(pl_module))

        self.task, self.trainer = fit(self.folder, self.kind, [adapter], Start(), saver)
        self.adapter = adapter
        self.trainer.save_checkpoint(self.folder / "last.ckpt")
        self.final = state(self.task)
        moved = {n for n, value in self.final.items() if n in started and not torch.equal(value, started[n])}
        parameters = {clean_name(n) for n, _ in self.task.named_parameters()}
        planned = {name for _, names in self.adapter.history for name in names}
        stray = {name for name in (moved & parameters) - planned if not any(part in name for part in self.traits.sets)}
        if stray and not self.traits.moves_more:
            return f"WRONG: {sorted(stray)[0]} moved"
        resting = sorted(planned - moved)
        if resting and not self.traits.may_rest:
            return f"WRONG: {resting[0]} did not move"
        with_gradients = {name for step in self.task.gradients for name in step}
        if not with_gradients <= planned and not self.traits.moves_more:
            return f"WRONG: {sorted(with_gradients - planned)[0]} got a gradient"
        self.expected = predict(self.task, self.kind)
        return "exact"

    def validate(self) -> str:
        same_run = pl.Trainer(callbacks=[self.adapter], **quiet(self.folder))
        (expected,) = same_run.validate(self.task, loader(self.kind), verbose=False)
        task = Task(self.kind)
        run = pl.Trainer(callbacks=[self.make()], **quiet(self.folder))
        (found,) = run.validate(task, loader(self.kind), ckpt_path=self.folder / "last.ckpt", verbose=False)
        return "exact" if found == expected else f"WRONG: {found} instead of {expected}"

    def resume(self) -> str:
        task, _ = fit(self.folder, self.kind, [self.make()], ckpt=self.folder / "half.ckpt")
        return "exact" if same(state(task), self.final) else f"WRONG: {difference(state(task), self.final)}"

    def load(self) -> str:
        task = load_from_checkpoint(Task, self.folder / "last.ckpt", kind=self.kind)
        return "exact" if same(state(task), self.final) else f"WRONG: {difference(state(task), self.final)}"

    def export(self) -> str:
        folder = self.adapter.export(self.folder / "adapter")
        base: Any = Task(self.kind).model
        loaded = PeftModel.from_pretrained(base, str(folder))
        holder = nn.Module()
        holder.model = loaded if self.traits.takes_the_models_place else base
        found = predict(holder, self.kind)
        if torch.equal(found, self.expected):
            return "exact"
        worst = float((found - self.expected).abs().max())
        return f"exact to {worst:.0e}" if worst <= 1e-5 else f"WRONG: the output differs by {worst:.1g}"

    def merge(self) -> str:
        predict(self.task, self.kind)  # says which task, where there are several
        merged = merge_adapters(self.adapter.handle)
        holder = nn.Module()
        holder.model = merged
        names = {name for name, _ in merged.named_parameters()}
        plain = {name for name, _ in Task(self.kind).model.named_parameters()}
        extra = {name for name in names - plain if not name.endswith(self.traits.merges_into)}
        if extra or plain - names:
            return f"WRONG: names differ, such as {sorted(extra | (plain - names))[0]}"
        worst = float((predict(holder, self.kind) - self.expected).abs().max())
        return "exact" if worst <= 1e-4 else f"WRONG: the output differs by {worst:.1g}"

    def quantised(self) -> str:
        folder = self.folder / "quantised"
        folder.mkdir()
        settings: dict[str, Any] = {"plugins": [QuantizedPrecision("nf4", skip=MODELS[self.kind].head)]}
        saver = SaveAt(folder / "half.ckpt", RESUME_AT)
        task, _ = fit(folder, self.kind, [self.make()], saver, **settings)
        codes = [p for p in task.parameters() if p.dtype == torch.uint8]
        if not codes:
            return "n/a: no linear layer to quantise"
        settings = {"plugins": [QuantizedPrecision("nf4", skip=MODELS[self.kind].head)]}
        again, _ = fit(folder, self.kind, [self.make()], ckpt=folder / "half.ckpt", **settings)
        return "exact" if same(state(again), state(task)) else f"WRONG: {difference(state(again), state(task))}"


def original(name: str) -> str:
    """What a base parameter was called before adapters were put around its layer."""
    return name.replace(".base_layer", "").replace("model.base_model.", "model.", 1).replace("original_module.", "")


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> str:
    if left.keys() != right.keys():
        return f"{sorted(left.keys() ^ right.keys())[0]} is on one side only"
    name = next(name for name in left if not torch.equal(left[name], right[name]))
    return f"{name} differs by {float((left[name].float() - right[name].float()).abs().max()):.1g}"


# ---------------------------------------------------------------------------------------------------- two processes


def parallel_fit(folder: Path, method: str, kind: str, strategy: Any, devices: int) -> dict[str, Any]:
    """Six steps, and the last three again from the checkpoint between."""
    results = []
    path = folder / "half.ckpt"
    for ckpt in (None, path):
        weights, adapter = WholeWeights(), METHODS[method].make(kind)
        more = [weights] if ckpt else [weights, SaveAt(path, RESUME_AT)]
        settings = {"strategy": strategy(), "devices": devices}
        task, _ = fit(folder, kind, [adapter], *more, ckpt=ckpt, task=Task(kind, True), **settings)
        results.append({"gradients": task.gradients, "weights": weights.values})
        if devices == 1:
            break
    return {**results[0], "resumed": results[-1]["weights"]}


def worker(out: Path, strategy: str, pairs: list[tuple[str, str]]) -> None:
    """On each of two processes."""
    for method, kind in pairs:
        folder = out / f"{method}-{kind}-{strategy}"
        try:
            result: dict[str, Any] = parallel_fit(folder, method, kind, STRATEGIES[strategy], 2)
        except LightningPeftError as error:
            result = {"cell": f"refused: {error}"}
        except Exception as error:
            if "were not used in producing the loss" in str(error):  # Lightning's own refusal
                result = {"cell": f"refused: {error}"}
                torch.save(result, out / f"{method}-{kind}-{strategy}-{os.environ['RANK']}.pt")
                continue
            result = {"cell": f"ERROR: {type(error).__name__}: {error}"}
        torch.save(result, out / f"{method}-{kind}-{strategy}-{os.environ['RANK']}.pt")


def judge(ranks: list[dict[str, Any]], expected: dict[str, Any], not_as_one: str) -> str:
    """What the cell of a strategy says."""
    if any("cell" in rank for rank in ranks):
        return next(rank["cell"] for rank in ranks if "cell" in rank)
    if not same(ranks[0]["weights"], ranks[1]["weights"]):
        return "WRONG: the ranks differ"
    worst = 0.0
    for step, other in zip(ranks[0]["gradients"], () if not_as_one else expected["gradients"], strict=not not_as_one):
        if step.keys() != other.keys():
            return f"WRONG: {sorted(step.keys() ^ other.keys())[0]} has a gradient on one side only"
        for name, gradient in other.items():
            size = max(1.0, float(gradient.abs().max()))
            worst = max(worst, float((step[name] - gradient).abs().max()) / size)
    if worst > 3e-5:
        return f"WRONG: gradients differ by {worst:.1g}"
    if not same(ranks[0]["resumed"], ranks[0]["weights"]):
        return f"WRONG: resumed, {difference(ranks[0]['resumed'], ranks[0]['weights'])}"
    return f"exact; {not_as_one}" if not_as_one else "exact"


# ---------------------------------------------------------------------------------------------------- the tables


def measure(methods: list[str], cells: dict[str, dict[str, dict[str, str]]]) -> None:
    from tests.distributed.launch import launch

    for method in methods:
        cells[method] = {}
        for kind in MODELS:
            with tempfile.TemporaryDirectory() as folder:
                cells[method][kind] = Probe(Path(folder), method, kind).run()
            print(method, kind, {k: v[:60] for k, v in cells[method][kind].items() if v != "exact"}, flush=True)
    pairs = [(m, k) for m in methods for k in MODELS if cells[m][k]["train"] == "exact"]
    for method in methods:
        for kind in MODELS:
            if (method, kind) not in pairs:
                cells[method][kind] |= dict.fromkeys(STRATEGIES, cells[method][kind]["train"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for strategy in STRATEGIES:
            (out / "pairs.json").write_text(json.dumps(pairs))
            launch(Path(__file__), "--worker", str(out), strategy, timeout=3000)
            for method, kind in pairs:
                ranks = [torch.load(out / f"{method}-{kind}-{strategy}-{rank}.pt") for rank in range(2)]
                expected = {} if "cell" in ranks[0] else parallel_fit(out / "one", method, kind, lambda: "auto", 1)
                not_as_one = METHODS[method].not_as_one
                if (method, kind) == ("ln_tuning", "conv"):
                    not_as_one = "BatchNorm in training sees the batch of its process"
                cells[method][kind][strategy] = judge(ranks, expected, not_as_one)


def tables(cells: dict[str, dict[str, dict[str, str]]]) -> str:
    """One table per model, with its footnotes."""
    parts = []
    for kind, model in MODELS.items():
        notes: dict[str, int] = {}
        lines = [f"### {model.title}", "", f"| method | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
        for method in [m for m in METHODS if m in cells]:
            row = cells[method][kind]
            shown = [_shown(row[step], notes) for step in STEPS]
            name = f"{method} (ours)" if method in NATIVE else method
            if all(row[step] == row["inject"] for step in STEPS) and row["inject"] != "exact":
                shown = [shown[0], *[""] * (len(STEPS) - 1)]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        lines += ["", *(f"{number}. {text}" for text, number in notes.items()), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _shown(cell: str, notes: dict[str, int]) -> str:
    kind, colon, reason = cell.partition(": ")
    if not colon:
        return cell
    reason = " ".join(reason.replace("|", "/").split())
    return f"{kind} [{notes.setdefault(reason, len(notes) + 1)}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--worker", nargs=2, metavar=("OUT", "STRATEGY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.worker:
        out = Path(arguments.worker[0])
        worker(out, arguments.worker[1], [tuple(pair) for pair in json.loads((out / "pairs.json").read_text())])
        return
    unknown = [method for method in arguments.methods if method not in METHODS]
    if unknown:
        sys.exit(f"No method {unknown[0]!r}; there are {', '.join(METHODS)}.")
    cells = json.loads(RESULTS.read_text()) if arguments.methods and RESULTS.exists() else {}
    measure(arguments.methods or list(METHODS), cells)
    RESULTS.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    head, _, rest = GUIDE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    GUIDE.write_text(f"{head}{BEGIN}\n{tables(cells)}{END}{tail}", encoding="utf-8")
    wrong = [
        f"{m}/{k}/{s}: {c}" for m, r in cells.items() for k, row in r.items() for s, c in row.items()
        if c.startswith(("WRONG", "ERROR"))
    ]  # fmt: skip
    print("\n".join(wrong) or "No cell is wrong.")


if __name__ == "__main__":
    main()
