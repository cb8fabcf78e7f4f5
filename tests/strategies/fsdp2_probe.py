"""Run by ``test_fsdp2.py`` on one and on two processes: fits tiny models and writes down what happened."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_peft import FSDP2Strategy
from lightning_peft.core.names import clean_name, named_parameters
from lightning_peft.core.sharded import whole
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import LightningPeftError
from lightning_peft.strategies.partial_state import reshard

GLOBAL_BATCH = 4
NUM_STEPS = 4
WIDTH = 5
num_tensor = 1


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=3, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)
        self.register_buffer("shift", torch.full((1,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale.to(x.dtype) * torch.tanh(self.linear(self.norm(x))) + self.shift.to(x.dtype)


class Stack(nn.Module):
    """A parameter of its own beside the blocks; the last block's weight is that of the first if ``tied``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(WIDTH, 3)
        if tied:
            self.blocks[3].linear.weight = self.blocks[0].linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.bias
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Language(pl.LightningModule):
    def __init__(self, make: Callable[[], nn.Module] = llama, lr: float = 0.01) -> None:
        super().__init__()
        self.model = make()
        self.lr = lr

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch[0]).logits

    def configure_optimizers(self) -> Any:
        # with the default eps, gradients that are zero up to rounding would move weights by a whole step
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, eps=1e-4)


class Vectors(Language):
    """Has ``forward`` and the default ``predict_step``."""

    predict_step = pl.LightningModule.predict_step

    def __init__(self, make: Callable[[], nn.Module] = Stack) -> None:
        super().__init__(make)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.model(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x).float(), y.float())


class TwoPasses(Vectors):
    """Goes through ``forward`` twice in a step, as contrastive training does."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self(x) * self(0.5 * x)).mean() + nn.functional.mse_loss(self(x), y)


class Manual(Vectors):
    """Two optimizers, two forward passes and a clipping of its own."""

    def __init__(self, make: Callable[[], nn.Module] = Stack) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        loss = self.loss(batch)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        body.step()
        loss = 2 * self.loss(batch)
        head.zero_grad()
        body.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(head, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        head.step()

    def configure_optimizers(self) -> Any:
        head = list(self.model.head.parameters())
        body = [p for p in self.parameters() if not any(p is q for q in head)]
        return [torch.optim.AdamW(body, lr=0.01), torch.optim.SGD(head, lr=0.1, momentum=0.9)]


class Outside(Vectors):
    """Goes through the model and parts of it outside a step, before and after the optimizer's."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        with torch.no_grad():
            self.model(torch.ones(1, WIDTH))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            hidden = self.model.blocks[0](batch[0])
            self.sums = [*getattr(self, "sums", []), self.model.head(hidden).sum() + self.model(batch[0]).sum()]

    def on_train_end(self) -> None:
        sums = torch.stack(self.sums)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        assert torch.isfinite(sums).all()
        self.seen.append(sums)

    seen: list[torch.Tensor] = []  # noqa: RUF012


class Sharded(Vectors):
    """Shards its blocks itself, and forgets the rest."""

    def configure_model(self) -> None:
        if not isinstance(self.model.blocks[0], FSDPModule) and isinstance(self.trainer.strategy, FSDP2Strategy):
            for block in self.model.blocks[:2]:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


class Late(Language):
    """Builds its model in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            with torch.random.fork_rng():
                torch.manual_seed(11)
                self.model = llama()


class Watch(pl.Callback):
    """Whole gradients of every optimizer step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.groups: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.groups = [clean_name(n) for n, m in pl_module.named_modules() if isinstance(m, FSDPModule)]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        reshard(pl_module)
        grads = {n: whole(p.grad).clone() for n, p in named_parameters(pl_module).items() if p.grad is not None}
        self.steps.append(grads)


class Freeze(pl.Callback):
    """Only the upper block and the head train."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_("2." in name or "head" in name)


class Save(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def loader(module: pl.LightningModule) -> DataLoader[Any]:
    """The joined batches are the same for any number of processes; ``num_tensor`` of them see the same data."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(module, Vectors):
        x = torch.randn(NUM_STEPS * GLOBAL_BATCH * 2, WIDTH, generator=generator)
        data = TensorDataset(x, x[:, :3].sin())
    else:
        data = TensorDataset(torch.randint(0, 19, (NUM_STEPS * GLOBAL_BATCH * 2, 6), generator=generator))
    size, rank = int(os.environ.get("WORLD_SIZE", "1")) // num_tensor, int(os.environ.get("RANK", "0")) // num_tensor
    sampler = DistributedSampler(data, size, rank, shuffle=False)
    return ResumableDataLoader(data, batch_size=GLOBAL_BATCH // size, sampler=sampler)


def weights(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    reshard(module)
    return {name: whole(p).clone() for name, p in named_parameters(module).items()}


def trainer(out: Path, strategy: Strategy | str, *callbacks: pl.Callback, **kw: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{
            "max_steps": NUM_STEPS,
            "enable_checkpointing": False,
            "limit_val_batches": 0,
            **kw,
        },
    )


def fit(
    out: Path,
    strategy: Strategy | str,
    make: Callable[[], pl.LightningModule] = Language,
    *callbacks: pl.Callback,
    ckpt: Path | None = None,
    seed: int = 5,
    **kw: Any,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    watch = Watch()
    run = trainer(out, strategy, *callbacks, watch, **kw)
    module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(module), loader(module), ckpt_path=ckpt)
    found = {"gradients": watch.steps, "weights": weights(module), "groups": watch.groups}
    return {**found, "outside": module.seen.pop()} if isinstance(module, Outside) else found


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except LightningPeftError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Case:
    """One run, and what of it differs between one process and two."""

    def __init__(self, make: Callable[[], pl.LightningModule], *callbacks: type[pl.Callback], **kw: Any) -> None:
        self.strategy = kw.pop("strategy", {})
        self.make, self.callbacks, self.kw = make, callbacks, kw

    def run(self, out: Path, single: bool) -> dict[str, Any]:
        strategy = "auto" if single else FSDP2Strategy(**self.strategy)
        return fit(out, strategy, self.make, *(callback() for callback in self.callbacks), **self.kw)


def compiled() -> nn.Module:
    return cast(nn.Module, torch.compile(Stack(), backend="eager"))


def compiled_blocks() -> nn.Module:
    model = Stack()
    for block in model.blocks:
        block.compile(backend="eager")
    return model


CASES: dict[str, Case] = {
    "llama": Case(Language),
    "built late": Case(Late),
    "tied": Case(lambda: Language(gpt2)),
    "vectors": Case(Vectors),
    "tied blocks": Case(lambda: Vectors(lambda: Stack(tied=True))),
    "named blocks": Case(Language, strategy={"blocks": ["LlamaMLP", "model.model.layers.*.self_attn"]}),
    "compiled": Case(lambda: Vectors(compiled)),
    "compiled blocks": Case(lambda: Vectors(compiled_blocks)),
    "two passes": Case(TwoPasses),
    "manual": Case(Manual),
    "outside a step": Case(Outside),
    "manual, compiled": Case(lambda: Manual(compiled)),
    "sharded by the user": Case(Sharded),
    "checkpointing": Case(Language, strategy={"activation_checkpointing": True}),
    "plain checkpointing": Case(Vectors, strategy={"activation_checkpointing": True}),
    "frozen below, checkpointing": Case(Vectors, Freeze, strategy={"activation_checkpointing": True}),
    "offload": Case(Language, strategy={"cpu_offload": True}, gradient_clip_val=0.5),
    "replicas": Case(Language, strategy={"num_replicas": 2}, gradient_clip_val=0.5),
    "kept gathered": Case(Language, strategy={"reshard_after_forward": False}),
    "accumulated": Case(Language, accumulate_grad_batches=2),
    "accumulated in shards": Case(Language, strategy={"reduce_every_micro_batch": True}, accumulate_grad_batches=2),
    "clipped by norm": Case(Language, gradient_clip_val=0.5),
    "clipped by value": Case(Language, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16 gathered in float32": Case(Language, strategy={"param_dtype": "float32"}, precision="bf16-mixed"),
    "bf16": Case(Language, precision="bf16-mixed"),
    "bf16, tied": Case(lambda: Language(gpt2), precision="bf16-mixed"),
    "bf16 true": Case(Language, precision="bf16-true"),
    "bf16 by policy": Case(Vectors, strategy={"param_dtype": "bfloat16"}),
}


def evaluate(run: pl.Trainer, module: Language) -> dict[str, Any]:
    return {
        "validate": run.validate(module, loader(module), verbose=False),
        "test": run.test(module, loader(module), verbose=False),
        "predict": torch.cat(run.predict(module, loader(module))).float(),
    }


def life(out: Path, strategy: Callable[[], Strategy | str], make: Callable[[], Language]) -> dict[str, Any]:
    """Evaluate, train with validation between, evaluate, and train again with another Trainer."""
    torch.manual_seed(5)
    module, results = make(), {}
    results["before"] = evaluate(trainer(out, strategy(), limit_val_batches=2), module)
    for fits in ("first", "second"):
        watch = Watch()
        run = trainer(out, strategy(), watch, limit_val_batches=2, val_check_interval=2)
        run.fit(module, loader(module), loader(module))
        results[fits] = {"gradients": watch.steps, "weights": weights(module), "logged": run.callback_metrics}
        results[f"after {fits}"] = evaluate(run, module)
    return results


def checkpoints(out: Path) -> dict[str, Any]:
    results = {}
    for form in ("sharded", "full"):
        for name, make in (("manual", Manual), ("compiled", lambda: Vectors(compiled))):
            kind, path = {"save_distributed_checkpoint": form == "sharded"}, out / f"{form}_{name}.ckpt"
            results[f"{form}/{name}"] = fit(out, FSDP2Strategy(**kind), make, Save(path))
            results[f"{form}/{name}/resumed"] = fit(out, FSDP2Strategy(**kind), make, ckpt=path, seed=6)
        path = out / f"{form}.ckpt"
        settings: dict[str, Any] = {"save_distributed_checkpoint": form == "sharded"}
        results[form] = fit(out, FSDP2Strategy(**settings), Language, Save(path))
        results[f"{form}/resumed"] = fit(out, FSDP2Strategy(**settings), Language, ckpt=path, seed=6)
        torch.manual_seed(7)
        module = Language()
        run = trainer(out, FSDP2Strategy(**settings))
        results[f"{form}/tested"] = run.test(module, loader(module), ckpt_path=path, verbose=False)
    return results


def materialized(out: Path) -> dict[str, Any]:
    """Models without memory: weights from a folder (in one file and in several), from a file of a body, and drawn."""
    results: dict[str, Any] = {}
    for name, folder in (("folder", "whole"), ("shards", "parts")):
        results[name] = fit_empty(out, weights=str(out / folder))
    results["meta device"] = fit_empty(out, weights=str(out / "whole"), how="device")
    results["offloaded"] = fit_empty(out, weights=str(out / "whole"), cpu_offload=True)
    results["tied"] = fit_empty(out, lambda: Language(gpt2), weights=str(out / "gpt2"))
    results["body"] = fit_empty(out, weights=str(out / "body" / "model.safetensors"))
    results["drawn"] = fit_empty(out, lambda: Language(gpt2))
    results["drawn vectors"] = fit_empty(out, lambda: Vectors(lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))))
    return results


def fit_empty(
    out: Path, make: Callable[[], Language] = Language, how: str = "trainer", **settings: Any
) -> dict[str, Any]:
    torch.manual_seed(5)
    start, watch = Start(), Watch()
    run = trainer(out, FSDP2Strategy(**settings), start, watch)
    with run.init_module(empty_init=True) if how == "trainer" else torch.device("meta"):
        module = make()
    assert all(p.is_meta for p in module.parameters())
    run.fit(module, loader(module))
    buffers = {name: whole(buffer).clone() for name, buffer in module.named_buffers()}
    return {"gradients": watch.steps, "weights": weights(module), "start": start.weights, "buffers": buffers}


class OnRankZero(Language):
    """Built with its weights on one rank (0 is as it should be) and without memory on the other."""

    def __init__(self, make: Callable[[], nn.Module] = gpt2, rank: int = 0) -> None:
        super().__init__(nn.Identity)
        torch.manual_seed(13)
        with nullcontext() if int(os.environ.get("RANK", "0")) == rank else torch.device("meta"):
            self.model = make()


class Start(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = weights(pl_module)


def unlike_ranks(out: Path) -> dict[str, Any]:
    """Every rank draws weights of its own."""
    start = Start()
    fit(out, FSDP2Strategy(), Vectors, start, seed=5 + int(os.environ["RANK"]))
    return start.weights


def adapters(out: Path, strategy: Strategy | str, quantised: bool) -> dict[str, Any]:
    """LoRA, put in between conversion and sharding, over a float32 or a 4-bit base."""
    return fit(out, strategy, Language, Inject(quantised))


class Inject(pl.Callback):
    def __init__(self, quantised: bool) -> None:
        self.quantised = quantised

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        original = trainer.strategy.setup

        def setup(run: pl.Trainer) -> None:
            trainer.strategy.setup = original
            self.inject(pl_module)
            original(run)

        trainer.strategy.setup = setup

    def inject(self, module: Any) -> None:
        from peft import LoraConfig, get_peft_model

        if self.quantised:
            quantise(module.model)
            module.model.is_loaded_in_4bit = True
        with torch.random.fork_rng():
            torch.manual_seed(9)
            config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            module.model = get_peft_model(module.model, config)


def quantise(model: nn.Module) -> None:
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers" in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            quantised = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            quantised.support_avx512bf16_for_cpu = False  # would repack the weights in evaluation on some machines
            setattr(parent, name.rpartition(".")[2], quantised.to("cpu"))


def mistakes(out: Path) -> dict[str, Any]:
    def attempt(make: Callable[[], Language] = Language, precision: Any = None, **settings: Any) -> str:
        return raised(lambda: fit(out, FSDP2Strategy(**settings), make, precision=precision))

    class Different(Vectors):
        def __init__(self) -> None:
            super().__init__()
            if os.environ["RANK"] == "1":
                self.more = nn.Linear(2, 2)

    class Dtypes(Vectors):
        def __init__(self) -> None:
            super().__init__()
            self.model.blocks[1].linear.to(torch.bfloat16)

    return {
        "dtypes": attempt(Dtypes),
        "tensor": attempt(tensor_parallel_size=3),
        "data": attempt(data_parallel_size=3),
        "replicas": attempt(num_replicas=3),
        "blocks": attempt(blocks=["LlamaDecoderLayers"]),
        "container": attempt(blocks=["model.model.layers"]),
        "different": attempt(Different),
        "no folder": raised(lambda: fit_empty(out, weights=str(out / "wholly"))),
        "not whole": raised(lambda: fit_empty(out, weights=str(out / "lacking"))),
        "other model": raised(lambda: fit_empty(out, lambda: Language(gpt2), weights=str(out / "whole"))),
        "rank 1 alone": attempt(lambda: OnRankZero(rank=1)),
        "another on rank 0": attempt(lambda: OnRankZero([gpt2, llama][int(os.environ["RANK"])])),
        "no reset": raised(lambda: fit_empty(out, Vectors)),
    }


def traffic(out: Path) -> dict[str, list[int]]:
    """Numbers of elements of every reduce-scatter of a fit, per setting."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    original, results = DefaultReduceScatter.__call__, {}
    sent: list[int] = []

    def counted(self: Any, output_tensor: Any, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(input_tensor.numel())
        return original(self, output_tensor, input_tensor, *args, **kwargs)

    DefaultReduceScatter.__call__ = counted
    try:
        for name, settings, callbacks, kw in (
            ("plain", {}, [], {}),
            ("accumulated", {}, [], {"accumulate_grad_batches": 4}),
            ("in shards", {"reduce_every_micro_batch": True}, [], {"accumulate_grad_batches": 4}),
            ("frozen below", {}, [Freeze], {}),
        ):
            sent = []
            fit(out, FSDP2Strategy(**settings), Vectors, *(c() for c in callbacks), max_steps=1, **kw)
            results[name] = list(sent)
    finally:
        DefaultReduceScatter.__call__ = original
    return results


def recomputed(out: Path) -> dict[str, list[int]]:
    """How often each block computes in one step, with the lower two frozen."""
    counts = [0] * 4

    class Count(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for index, block in enumerate(pl_module.model.blocks):
                block.linear.register_forward_hook(lambda *_, i=index: counts.__setitem__(i, counts[i] + 1))

    results = {}
    for name, callbacks in (("all train", [Count()]), ("frozen below", [Freeze(), Count()])):
        counts[:] = [0] * 4
        fit(out, FSDP2Strategy(activation_checkpointing=True), Vectors, *callbacks, max_steps=1)
        results[name] = list(counts)
    return results


def main(task: str, out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    if task == "cases":
        results = {name: case.run(out, single=False) for name, case in CASES.items()}
    else:
        results["life"] = life(out, FSDP2Strategy, Language)
        results["life of vectors"] = life(out, FSDP2Strategy, Vectors)
        results["checkpoints"] = checkpoints(out)
        results["materialized"] = materialized(out)
        results["rank zero"] = {
            "tied": fit(out, FSDP2Strategy(), OnRankZero),
            "buffers": fit(out, FSDP2Strategy(cpu_offload=True), lambda: OnRankZero(llama)),
        }
        results["unlike"] = unlike_ranks(out)
        results["mistakes"] = mistakes(out)
        results["traffic"] = traffic(out)
        results["recomputed"] = recomputed(out)
        for name, quantised in (("lora", False), ("qlora", True)):
            results[name] = adapters(out, FSDP2Strategy(), quantised)
    torch.save(results, out / f"{task}_rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
