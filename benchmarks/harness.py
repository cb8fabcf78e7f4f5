"""What all benchmarks share: Trainers in lock-step, exact counts of bytes and operations, result files.

Times on a shared machine drift by more than the methods differ, so that no two runs after one another can be compared.
Here all variants live in one process, each with a Trainer and a thread of its own, and exactly one of them runs at any
time, for one optimizer step. The order is shuffled in each round. What is reported is the median of the ratios to the
baseline *within* a round, with a second copy of the baseline as a control.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "DecoderBatches",
    "DecoderModule",
    "DecoderShape",
    "ExactCost",
    "Gate",
    "HookTimer",
    "Lane",
    "Ratio",
    "StepCounter",
    "Turn",
    "Variant",
    "bar",
    "environment",
    "exact_cost",
    "gradient_bytes",
    "hook_costs",
    "lock_step",
    "make_trainer",
    "mib",
    "optimizer_bytes",
    "paired_ratio",
    "quiet_lightning",
    "run_lanes",
    "saved_activations",
    "share_one_heap",
    "write_json",
]

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""The callback hooks that Lightning calls in every optimizer step."""

# ---------------------------------------------------------------------------------------------------- the subject


@dataclass(frozen=True)
class DecoderShape:
    """Shape of the Llama decoder that step costs are measured on, and of its batch."""

    num_layers: int = 8
    width: int = 256
    ffn_width: int = 672
    num_heads: int = 4
    vocab_size: int = 2048
    batch_size: int = 4
    num_tokens: int = 128

    @classmethod
    def tiny(cls) -> DecoderShape:
        """Return a shape that runs in milliseconds, to try a script out; its ratios mean nothing."""
        return cls(width=16, ffn_width=40, num_heads=2, vocab_size=64, batch_size=1, num_tokens=8)


class DecoderModule(LightningModule):
    """A LightningModule as a user has it: a Hugging Face Llama with random weights, AdamW over all parameters.

    Args:
        shape: Shape of the model.
        learning_rate: Of AdamW.
    """

    def __init__(self, shape: DecoderShape, learning_rate: float = 1e-4) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.ffn_width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            max_position_embeddings=shape.num_tokens,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = LlamaForCausalLM(config)
        self.learning_rate = learning_rate

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the next-token loss."""
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class DecoderBatches:
    """Batches of random tokens, the same at every iteration.

    Lightning takes a plain list for several loaders, hence a class.

    Args:
        shape: Shape of a batch.
        num_batches: How many there are.
    """

    def __init__(self, shape: DecoderShape, num_batches: int) -> None:
        self._shape, self._num_batches = shape, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        size = (self._shape.batch_size, self._shape.num_tokens)
        for _ in range(self._num_batches):
            yield torch.randint(0, self._shape.vocab_size, size, generator=generator)


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune the same model.

    Args:
        callbacks: Builds its callbacks; none is full fine-tuning.
        module: Builds its LightningModule, for variants that change the model itself; None takes the common one.
        note: What it is, for the result file.
    """

    callbacks: Callable[[], list[Callback]] = list
    module: Callable[[], LightningModule] | None = None
    note: str = ""


def make_trainer(callbacks: Sequence[Callback], max_steps: int) -> Trainer:
    """Return a CPU Trainer that runs ``max_steps`` optimizer steps and writes nothing."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# ---------------------------------------------------------------------------------------------------- lock-step


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one variant.

    Args:
        step: Optimizer steps done before it.
        wall_seconds: From the end of the last callback of the step before to the end of the last callback of this one.
        cpu_seconds: Time of the process over the same span; nothing else runs in it.
    """

    step: int
    wall_seconds: float
    cpu_seconds: float


class _Stop(Exception):
    """Ends a Trainer that waits at its gate."""


class Gate(Callback):
    """Let a Trainer pass one optimizer step at a time. Must be the last of its callbacks."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.is_closed = False
        self._step = 0
        self._wall = self._cpu = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first turn."""
        self._step = trainer.global_step
        self._wait()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End a turn and wait for the next, unless this was a micro-batch without an optimizer step."""
        if trainer.global_step == self._step:
            return
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.turns.append(Turn(self._step, wall, cpu))
        self._step = trainer.global_step
        self._wait()

    def _wait(self) -> None:
        self.arrived.release()
        self.go.acquire()
        if self.is_closed:
            raise _Stop
        self._cpu, self._wall = time.process_time(), time.perf_counter()


class _Runner:
    """A Trainer in a thread of its own, stopped at its gate unless it has the turn."""

    def __init__(self, name: str, fit: Callable[[Gate], object], threads: int) -> None:
        self.name, self.gate = name, Gate()
        self._fit, self._threads = fit, threads
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"lock-step {name}", daemon=True)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps this number per thread
        try:
            self._fit(self.gate)
        except _Stop:
            pass
        except BaseException as error:  # raised again in the main thread
            self._error = error
        finally:
            self._ended = True
            self.gate.arrived.release()

    def start(self) -> None:
        """Run up to the first gate."""
        self._thread.start()
        self._await()

    def step(self) -> None:
        """Run one optimizer step."""
        self.gate.go.release()
        self._await()

    def _await(self) -> None:
        self.gate.arrived.acquire()
        if self._error is not None:
            raise self._error
        if self._ended:
            raise RuntimeError(f"{self.name}: the fit ended after {len(self.gate.turns)} steps, before its last turn.")

    def finish(self) -> None:
        """Let the fit end by itself."""
        self.gate.go.release()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the fit where it stands; safe to call at any time."""
        self.gate.is_closed = True
        self.gate.go.release()
        if self._thread.ident is not None:
            self._thread.join()


def lock_step(
    fits: Mapping[str, Callable[[Gate], object]],
    *,
    rounds: int,
    warmup: int = 2,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Turn]]:
    """Run several fits in one process, one optimizer step at a time, in an order shuffled in each round.

    Args:
        fits: Name -> function that runs ``Trainer.fit`` with the given gate as its last callback, for exactly
            ``warmup + rounds`` optimizer steps.
        rounds: Measured rounds; in each, every fit makes one step.
        warmup: Rounds before them that are run and not returned.
        threads: Threads of torch within a step. More than 1 on a machine that others use measures the others.
        seed: Of the shuffled order.
        progress: Called with the number of each finished round, warm-up included.

    Returns:
        The measured turns of each fit, one per round.

    Raises:
        RuntimeError: If a fit ends before its last turn. A fit's own error is raised as it is.
    """
    order = random.Random(seed)
    runners = [_Runner(name, fit, threads) for name, fit in fits.items()]
    threads_before, collects = torch.get_num_threads(), gc.isenabled()
    gc.disable()  # collected between rounds, not within a turn
    try:
        for runner in runners:
            runner.start()
        for number in range(warmup + rounds):
            gc.collect()
            for runner in order.sample(runners, len(runners)):
                runner.step()
            progress(number + 1)
        for runner in runners:
            runner.finish()
    finally:
        for runner in runners:
            runner.close()
        torch.set_num_threads(threads_before)
        if collects:
            gc.enable()
    return {runner.name: runner.gate.turns[warmup:] for runner in runners}


def quiet_lightning() -> None:
    """Leave out what Lightning says at each start of a Trainer and the progress bars of loading; warnings stay."""
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def share_one_heap() -> bool:
    """Let all threads allocate from one heap, as a program with one thread does; return whether it worked (glibc)."""
    m_arena_max = -8
    try:
        return bool(ctypes.CDLL(None).mallopt(m_arena_max, 1))
    except (OSError, AttributeError, TypeError):
        return False


@dataclass
class Lane:
    """What the lock-step run of one variant left behind.

    Args:
        turns: One per measured round.
        callbacks: The variant's own callbacks.
        hook_seconds: Time spent in the variant's callbacks and optimizer hooks, per step from step 0 on.
        draws: Optimizer steps before which a callback with a ``history`` drew.
    """

    turns: list[Turn]
    callbacks: list[Callback]
    hook_seconds: list[float]
    draws: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.draws = frozenset(step for callback in self.callbacks for step, _ in getattr(callback, "history", ()))

    def is_draw(self, turn: Turn) -> bool:
        """Whether the variant drew at the start of ``turn``."""
        return turn.step in self.draws


def run_lanes(
    variants: Mapping[str, Variant],
    shape: DecoderShape,
    *,
    rounds: int,
    warmup: int = 2,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Lane]:
    """Fine-tune the decoder in all variants in lock-step, each through a ``Trainer`` of its own; see `lock_step`."""
    callbacks = {name: variant.callbacks() for name, variant in variants.items()}
    timers = {name: HookTimer() for name in variants}

    def fit(name: str, gate: Gate) -> None:
        make = variants[name].module
        timer = timers[name]
        trainer = make_trainer([timer.opening, *callbacks[name], timer.closing, gate], warmup + rounds)
        trainer.fit(make() if make is not None else DecoderModule(shape), DecoderBatches(shape, warmup + rounds))

    turns = lock_step(
        {name: lambda gate, name=name: fit(name, gate) for name in variants},
        rounds=rounds,
        warmup=warmup,
        threads=threads,
        seed=seed,
        progress=progress,
    )
    return {name: Lane(turns[name], callbacks[name], timers[name].seconds) for name in variants}


# ---------------------------------------------------------------------------------------------------- hooks


class _Edge(Callback):
    """Call ``mark`` in every hook of a step and in the hooks of the optimizers."""

    def __init__(self, mark: Callable[[str], None]) -> None:
        self._mark = mark
        for hook in STEP_HOOKS:
            setattr(self, hook, lambda *_, hook=hook: mark(hook))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._mark("step_pre_hook"))
            optimizer.register_step_post_hook(lambda *_: self._mark("step_post_hook"))


class HookTimer:
    """Time what stands between two callbacks: the hooks of the callbacks there, and the optimizer hooks they register.

    Put ``opening`` right before and ``closing`` right after the callbacks to be measured. With nothing between them it
    measures Lightning's own cost of a call, to be subtracted.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = self._sum = 0.0
        self.opening, self.closing = _Edge(self._open), _Edge(self._close)

    def _open(self, hook: str) -> None:
        self._start = time.perf_counter()

    def _close(self, hook: str) -> None:
        self._sum += time.perf_counter() - self._start
        if hook == "on_train_batch_end":
            self.seconds.append(self._sum)
            self._sum = 0.0


def hook_costs(lane: Lane, empty: Lane, period_steps: int) -> dict[str, float]:
    """Return what a method's hooks cost, as seconds and as fractions of the baseline's step.

    Args:
        lane: The method.
        empty: A lane without callbacks: gives Lightning's own cost of the calls, and the length of a step.
        period_steps: Steps between draws for which ``fraction_of_step`` is given, whatever the measured period is.

    Returns:
        ``plain_seconds`` (median over steps without a draw), ``draw_seconds`` (median over steps with one),
        ``first_step_seconds`` (the very first, with its checks), ``step_seconds`` (a step of the baseline),
        ``fraction_of_step`` (one draw in ``period_steps`` steps) and ``draw_fraction`` (a draw, of that period).
    """
    own = statistics.median(empty.hook_seconds[1:])
    drawn = [lane.hook_seconds[turn.step] - own for turn in lane.turns if lane.is_draw(turn)]
    plain = [lane.hook_seconds[turn.step] - own for turn in lane.turns if not lane.is_draw(turn)]
    step = statistics.median(turn.wall_seconds for turn in empty.turns)
    plain_seconds = statistics.median(plain or drawn)
    draw_seconds = statistics.median(drawn) if drawn else plain_seconds
    extra = draw_seconds - plain_seconds
    return {
        "plain_seconds": plain_seconds,
        "draw_seconds": draw_seconds,
        "first_step_seconds": lane.hook_seconds[0] - own,
        "step_seconds": step,
        "fraction_of_step": (plain_seconds + extra / period_steps) / step,
        "draw_fraction": extra / (period_steps * step),
    }


# ---------------------------------------------------------------------------------------------------- ratios


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios.

    Args:
        median: Over all pairs.
        quartiles: First and third.
        blocks: Medians of up to three consecutive blocks of rounds: how far they lie apart is how far to trust it.
        num_pairs: Number of pairs.
    """

    median: float
    quartiles: tuple[float, float]
    blocks: tuple[float, ...]
    num_pairs: int


def paired_ratio(values: Sequence[float], baseline: Sequence[float], keep: Iterable[bool] | None = None) -> Ratio:
    """Return the ratio of ``values`` to ``baseline``, paired by position.

    Args:
        values: One per round.
        baseline: One per round, from the same rounds.
        keep: Which rounds count; None: all.

    Example:
        >>> paired_ratio([1.0, 2.0, 9.0], [2.0, 4.0, 9.0], keep=[True, True, False]).median
        0.5
    """
    pairs = [value / base for value, base in zip(values, baseline, strict=True)]
    if keep is not None:
        pairs = [ratio for ratio, kept in zip(pairs, keep, strict=True) if kept]
    if not pairs:
        raise ValueError("there is no round to compare: run more rounds")
    size = -(-len(pairs) // 3)
    blocks = tuple(statistics.median(pairs[start : start + size]) for start in range(0, len(pairs), size))
    cuts = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else [pairs[0]] * 3
    return Ratio(statistics.median(pairs), (cuts[0], cuts[2]), blocks, len(pairs))


# ---------------------------------------------------------------------------------------------------- exact counts


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the bytes of all tensors in the optimizers' states."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    return sum(leaf.nbytes for state in states for leaf in state.values() if isinstance(leaf, torch.Tensor))


def gradient_bytes(module: nn.Module) -> int:
    """Return the bytes of all gradients that exist now."""
    return sum(parameter.grad.nbytes for parameter in module.parameters() if parameter.grad is not None)


class saved_activations(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that the forward pass keeps for the backward pass, each storage once, without the model's own.

    Args:
        module: The model; its parameters and buffers are not counted.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes seen so far. Right after the forward pass all of them are alive, so no address is counted twice."""
        return sum(self._storages.values())


@dataclass(frozen=True)
class ExactCost:
    """What one step costs, counted, not timed.

    Args:
        flops: Of the step's matrix products, forward and backward. The core of attention is not counted on the CPU.
        activation_bytes: Kept by the forward pass for the backward pass.
        gradient_bytes: Gradients at the optimizer step.
        optimizer_bytes: Optimizer state after the step.
        trainable_parameters: Parameters that train in this step.
    """

    flops: int
    activation_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    trainable_parameters: int


class StepCounter(Callback):
    """Count what each optimizer step costs. Must be the last callback, without gradient accumulation."""

    def __init__(self) -> None:
        self.steps: list[ExactCost] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start counting."""
        self._trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self._flops = FlopCounterMode(display=False)
        self._flops.__enter__()
        self._saved = saved_activations(pl_module)
        self._saved.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        """The forward pass is over: everything it keeps is alive."""
        self._saved.__exit__()
        self._activations = self._saved.num_bytes

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """All gradients are there."""
        self._gradients = gradient_bytes(pl_module)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop counting."""
        self._flops.__exit__(None, None, None)
        self.steps.append(
            ExactCost(
                self._flops.get_total_flops(),
                self._activations,
                self._gradients,
                optimizer_bytes(trainer.optimizers),
                self._trainable,
            )
        )


def exact_cost(variant: Variant, shape: DecoderShape, num_steps: int) -> list[ExactCost]:
    """Return what each of the first ``num_steps`` steps of a variant costs; exact, and the same at every call."""
    counter = StepCounter()
    trainer = make_trainer([*variant.callbacks(), counter], num_steps)
    module = variant.module() if variant.module is not None else DecoderModule(shape)
    trainer.fit(module, DecoderBatches(shape, num_steps))
    return counter.steps


# ---------------------------------------------------------------------------------------------------- results


def environment(script: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what a result file says of its origin: command, date, commit, versions and machine.

    Args:
        script: Name of the script's module in this folder.
        arguments: Its arguments; None takes those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    packages = ("torch", "lightning", "transformers", "lightning_peft")
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def bar(name: str, value: float, limit: float) -> dict[str, Any]:
    """Return one requirement: ``value`` must not be above ``limit``."""
    return {"bar": name, "value": round(value, 4), "limit": limit, "holds": bool(value <= limit)}


def mib(num_bytes: float) -> str:
    """Return bytes as MiB with one decimal."""
    return f"{num_bytes / 2**20:.1f}"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file: dataclasses as objects, times to the microsecond."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(result), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return round(value, 7) if isinstance(value, float) else value
