"""PaCA in whole fits: dense training with masks as oracle, exact set, bytes, resume, precision, mistakes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from benchmarks.harness import saved_activations
from lightning_peft import LISA, PaCA
from lightning_peft.core.trainable import state_bytes
from lightning_peft.errors import ConfigError, PlanConflict, ResumeMismatch, ScopeError
from lightning_peft.methods.slices.layer import SlicedLayer, sliced_layers
from tests.contract.harness import TinyModule, assert_same_weights, loader, trainer, weights
from tests.distributed.launch import launch
from tests.methods.slices import paca_ddp_probe

RANK = 3
DECODERS = ("gqa_decoder", "tied_decoder")


def fit(
    tmp_path: Path,
    module: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    model: str = "gqa_decoder",
    ckpt: Path | None = None,
    **settings: Any,
) -> pl.Trainer:
    torch.manual_seed(5 if ckpt is None else 77)
    run = trainer(tmp_path, callbacks, **settings)
    run.fit(module, loader(model), loader(model, shuffle=False), ckpt_path=ckpt)
    return run


def masks(method: PaCA, module: nn.Module) -> dict[str, torch.Tensor]:
    """Of the dense parameter of each layer: ones in the chosen columns."""
    found = {}
    for path, index in method.chosen.items():
        layer: Any = module.get_submodule(path)
        mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
        mask[(slice(None), index) if isinstance(layer, nn.Linear) else index] = True
        found[f"{path}.weight"] = mask
    return found


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW over whole weights of which only the elements in a mask move, written out."""

    def __init__(self, masked: list[tuple[nn.Parameter, torch.Tensor]], lr: float, weight_decay: float) -> None:
        self.masks = {id(parameter): mask for parameter, mask in masked}
        super().__init__([parameter for parameter, _ in masked], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
                state["t"] += 1
                state["m"] = 0.9 * state["m"] + 0.1 * parameter.grad
                state["v"] = 0.999 * state["v"] + 0.001 * parameter.grad**2
                m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
                stepped = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * m / (v.sqrt() + 1e-8)
                parameter.copy_(torch.where(self.masks[id(parameter)], stepped, parameter))
        return loss


class Dense(TinyModule):
    """The oracle: whole weights, gradients outside the masks set to zero before clipping, masked AdamW."""

    def __init__(self, model: str, mask: dict[str, torch.Tensor]) -> None:
        super().__init__(model)
        self.masked = [(parameter, mask[name]) for name, parameter in self.named_parameters() if name in mask]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in mask)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter, mask in self.masked:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)

    def configure_optimizers(self) -> Any:
        optimizer = MaskedAdamW(self.masked, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recompute(TinyModule):
    """Under activation checkpointing."""

    def on_train_start(self) -> None:
        model: Any = self.model
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("model", DECODERS)
def test_training_is_that_of_the_dense_model_under_masks(model: str, accumulate: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": model, "accumulate_grad_batches": accumulate, "max_epochs": 1}
    method, module = PaCA(RANK), TinyModule(model)
    before = weights(module)
    run = fit(tmp_path, module, [method], **settings)
    mask = masks(method, module)
    assert len(mask) == 4 * (7 if model == "gqa_decoder" else 4)
    assert all(int(m.any(0 if model == "gqa_decoder" else 1).sum()) == RANK for m in mask.values())
    dense = Dense(model, mask)
    oracle = fit(tmp_path, dense, [], **settings)
    assert run.global_step == oracle.global_step == (11 if accumulate == 1 else 4)
    assert run.callback_metrics["val_loss"].item() == pytest.approx(
        oracle.callback_metrics["val_loss"].item(), abs=1e-6
    )
    expected, after = weights(dense), weights(module)
    assert after.keys() == before.keys() == expected.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
        outside = ~mask[name] if name in mask else torch.ones(value.shape, dtype=torch.bool)
        assert torch.equal(value[outside], before[name][outside]), name
        assert bool((value != before[name])[~outside].all()), name


class Look(pl.Callback):
    """What is true in every optimizer step, seen from outside."""

    def __init__(self, method: PaCA) -> None:
        self.method, self.steps = method, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = weights(pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.planned = self.method.trainable_names
        assert {name for name, p in named.items() if p.requires_grad} == self.planned
        assert {name for name, p in named.items() if p.grad is not None} == self.planned

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        raw = {name: p.detach().clone() for name, p in pl_module.named_parameters()}  # no state_dict, which would write
        after = weights(pl_module)
        assert all(torch.equal(after[name], raw[name]) for name in after.keys() & raw.keys())
        moved = {name for name in raw.keys() & after.keys() if not torch.equal(after[name], self.before[name])}
        assert {name.replace("weight_slice", "weight") for name in self.planned} == moved
        for path, layer in sliced_layers(pl_module):
            changed = after[f"{path}.weight"] != self.before[f"{path}.weight"]
            assert set(changed.any(1 - layer.slice_dim).nonzero().flatten().tolist()) <= set(
                self.method.chosen[path].tolist()
            )
        in_state = {name for name, p in pl_module.named_parameters() if p in trainer.optimizers[0].state}
        assert in_state == self.planned
        self.before = after


@pytest.mark.parametrize(("filtered", "optimizer"), [(True, "adamw"), (False, "sgd")])
@pytest.mark.parametrize("model", DECODERS)
def test_each_step_moves_the_plan_and_nothing_else(model: str, filtered: bool, optimizer: str, tmp_path: Path) -> None:
    method = PaCA(RANK, always=["norms"])
    module = TinyModule(model, optimizer, filtered)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    look = Look(method)
    run = fit(tmp_path, module, [method, look], model, num_sanity_val_steps=1)
    assert look.steps == 12
    assert len(method.history) == 1
    slices = {name for name in method.trainable_names if name.endswith(".weight_slice")}
    assert slices == {f"{path}.weight_slice" for path in method.chosen}
    assert len(method.trainable_names) > len(slices)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert not list(sliced_layers(module))
    run.validate(module, loader(model, shuffle=False), verbose=False)


def test_optimizer_state_and_activations_are_as_calculated(tmp_path: Path) -> None:
    method, module = PaCA(RANK), TinyModule("gqa_decoder")
    run = fit(tmp_path, module, [method])
    hidden, ffn, kv, layers = 8, 12, 4, 4
    columns = layers * RANK * (hidden + kv + kv + hidden + ffn + ffn + hidden)
    assert state_bytes(run.optimizers) == columns * 2 * 4 + layers * 7 * 4  # and a step counter per tensor
    described = method.describe()
    assert described["num_trainable_parameters"] == columns

    tokens, dtype_bytes = 2 * 7, 4
    kept = []
    for rank in (None, 1, 2, 5):
        model = copy.deepcopy(module)
        if rank is None:
            model.requires_grad_(False)
            model.model.get_input_embeddings().requires_grad_(True)  # pyright: ignore[reportCallIssue]
        else:
            model.requires_grad_(True)
            PaCA(rank).convert(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("weight_slice") or "embed" in name)
        counter = saved_activations(model)
        with counter:
            model.loss(next(iter(loader("gqa_decoder", shuffle=False))))
        kept.append(counter.num_bytes)
    # Frozen but passed through, plus one feature per token, column and layer.
    assert [value - kept[0] for value in kept[1:]] == [layers * 7 * rank * tokens * dtype_bytes for rank in (1, 2, 5)]


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory, self.paths = directory, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.directory / f"{len(self.paths):03d}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)


@pytest.mark.parametrize("model", DECODERS)
def test_resume_is_exact_and_checkpoints_are_the_plain_models(model: str, tmp_path: Path) -> None:
    module, saver = TinyModule(model), SaveEveryBatch(tmp_path)
    run = fit(tmp_path, module, [PaCA(RANK), saver], model)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert len(saver.paths) == 22
    for path in saver.paths[4::9]:
        again = TinyModule(model)
        resumed = fit(tmp_path, again, [PaCA(RANK)], model, ckpt=path)
        assert_same_weights(weights(again), weights(module))
        old, new = (r.optimizers[0].state_dict()["state"] for r in (run, resumed))
        assert all(torch.equal(old[i][key], new[i][key]) for i in old for key in old[i])
    for path in (saver.paths[-1], tmp_path / "end.ckpt"):
        plain = TinyModule(model)
        plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])  # strictly
        assert_same_weights(weights(plain), weights(module))
    with pytest.raises(ResumeMismatch, match=r"seed: 0 -> 1"):
        fit(tmp_path, TinyModule(model), [PaCA(RANK, seed=1)], model, ckpt=saver.paths[3])


def test_a_checkpoint_keeps_its_columns(tmp_path: Path) -> None:
    """Should torch draw others one day, the run goes on with those that the optimizer's state belongs to."""
    module, saver = TinyModule("gqa_decoder"), SaveEveryBatch(tmp_path)
    method = PaCA(RANK)
    fit(tmp_path, module, [method, saver])

    class Other(PaCA):
        def choose(self, layers: Any) -> Any:
            self.seed, seed = 9, self.seed
            try:
                return super().choose(layers)
            finally:
                self.seed = seed

    Other.__name__ = "PaCA"
    again, other = TinyModule("gqa_decoder"), Other(RANK)
    checkpoint = torch.load(saver.paths[9], weights_only=False)
    (state,) = (state for state in checkpoint["callbacks"].values() if state)
    checkpoint["callbacks"] = {other.state_key: state}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    fit(tmp_path, again, [other], ckpt=tmp_path / "other.ckpt")
    assert other.chosen.keys() == method.chosen.keys()
    assert all(torch.equal(index, method.chosen[path]) for path, index in other.chosen.items())
    assert_same_weights(weights(again), weights(module))


def test_activation_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    results = []
    for kind in (TinyModule, Recompute):
        module = kind("gqa_decoder")
        fit(tmp_path, module, [PaCA(RANK)], max_epochs=1)
        results.append(weights(module))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)


def test_averages_are_those_of_the_dense_model(tmp_path: Path) -> None:
    method, module = PaCA(RANK), TinyModule("gqa_decoder")
    run = fit(tmp_path, module, [method, EMAWeightAveraging(decay=0.5)], max_epochs=1)
    run.save_checkpoint(tmp_path / "average.ckpt")
    dense = Dense("gqa_decoder", masks(method, module))
    fit(tmp_path, dense, [EMAWeightAveraging(decay=0.5)], max_epochs=1)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, weights(dense)[name], rtol=0, atol=1e-6, msg=name)
    averaged = torch.load(tmp_path / "average.ckpt", weights_only=False)["state_dict"]
    assert averaged.keys() == weights(module).keys()
    with pytest.raises(ConfigError, match="Put PaCA before it in callbacks"):
        fit(tmp_path, TinyModule("gqa_decoder"), [EMAWeightAveraging(), PaCA(RANK)])


class Later(TinyModule):
    """Builds its model in ``configure_model``."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.built, self.model = self.model, nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            self.model, self.built = self.built, None


def test_a_model_built_in_configure_model(tmp_path: Path) -> None:
    results = []
    for kind in (TinyModule, Later):
        module = kind("gqa_decoder")
        fit(tmp_path, module, [PaCA(RANK)], max_epochs=1)
        results.append(weights(module))
    assert_same_weights(*results)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision(precision: Any, tmp_path: Path) -> None:
    method, module = PaCA(RANK), TinyModule("gqa_decoder")
    look = Look(method)
    fit(tmp_path, module, [method, look], precision=precision, max_epochs=1)
    assert look.steps == 6
    dense = Dense("gqa_decoder", masks(method, module))
    if precision == "bf16-mixed":  # whose AdamW, unlike one written out in bfloat16, is exact
        fit(tmp_path, dense, [], precision=precision, max_epochs=1)
        for name, value in weights(module).items():
            torch.testing.assert_close(value, weights(dense)[name], rtol=0, atol=5e-3)


def test_columns_depend_on_seed_and_layer_alone() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        method, state = PaCA(RANK, seed=seed), torch.get_rng_state()
        method.convert(TinyModule("gqa_decoder"))
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({path: tuple(index.tolist()) for path, index in method.chosen.items()})
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0].values())) > 12  # of 28 layers: not one set for all
    assert all(list(index) == sorted(set(index)) and len(index) == RANK for index in drawn[0].values())
    method = PaCA(8, scope="*.q_proj")
    assert len(method.convert(TinyModule("gqa_decoder"))) == 4
    assert all(index.tolist() == list(range(8)) for index in method.chosen.values())


class Fail(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise KeyError("stop")


def test_the_model_is_plain_again_however_a_fit_ends(tmp_path: Path) -> None:
    module = TinyModule("gqa_decoder")
    before = weights(module)
    with pytest.raises(KeyError, match="stop"):
        fit(tmp_path, module, [PaCA(RANK), Fail()])
    assert not list(sliced_layers(module))
    assert any(not torch.equal(value, before[name]) for name, value in weights(module).items())
    with pytest.raises(PlanConflict, match="both claim"):
        fit(tmp_path, module, [PaCA(RANK), LISA(1, always=())])
    assert not list(sliced_layers(module))
    fit(tmp_path, module, [LISA(1)])
    fit(tmp_path, module, [PaCA(RANK), LISA(1, scope="*.[01].input_layernorm.*", always=("embeddings",))])


def test_mistakes(tmp_path: Path) -> None:
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="rank="):
            PaCA(rank)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"rank=9 is more columns than 24 layer.*q_proj for one with 8"):
        fit(tmp_path, TinyModule("gqa_decoder"), [PaCA(9)])
    with pytest.raises(ScopeError, match=r"of the 9 layer.* none is a torch.nn.Linear"):
        fit(tmp_path, TinyModule("gqa_decoder"), [PaCA(scope="norms")])
    with pytest.raises(ScopeError, match="not tied"):
        fit(tmp_path, TinyModule("tied_decoder"), [PaCA(scope="head")], "tied_decoder")
    with pytest.raises(ScopeError, match=r"none is a torch.nn.Linear"):
        fit(tmp_path, TinyModule("conv_net"), [PaCA(RANK)], "conv_net")
    with pytest.raises(PlanConflict, match=r"always=\['head'\].*lm_head.weight for one"):
        fit(tmp_path, TinyModule("gqa_decoder"), [PaCA(RANK, scope=["blocks", "head"], always=["head"])])
    with pytest.raises(PlanConflict, match="another method trains a part"):
        fit(tmp_path, TinyModule("gqa_decoder"), [PaCA(RANK), PaCA(RANK, scope="*.q_proj")])
    frozen = TinyModule("gqa_decoder").requires_grad_(False)
    with pytest.raises(ScopeError, match="does not thaw what you froze"):
        fit(tmp_path, frozen, [PaCA(RANK)])
    method = PaCA(RANK, scope="*.q_proj")
    fit(tmp_path, frozen, [method])
    assert len(method.trainable_names) == 4
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(isinstance(layer, SlicedLayer) for layer in frozen.modules())


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    """DDP equals one process on the joined batches; FSDP2 is refused with the reason."""
    launch(Path(paca_ddp_probe.__file__), str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert_same_weights(first["weights"], second["weights"])
    assert_same_weights(first["resumed"], first["weights"])
    assert all(torch.equal(index, second["chosen"][path]) for path, index in first["chosen"].items())
    assert first["reduced"] == [4 * RANK * 56] * 6
    single, method = paca_ddp_probe.fit(tmp_path)
    assert all(torch.equal(index, first["chosen"][path]) for path, index in method.chosen.items())
    for name, value in single.items():
        torch.testing.assert_close(value, first["weights"][name], rtol=0, atol=1e-5, msg=name)
    assert "whole weights" in first["refused"]
    assert "gives each process a piece" in first["refused"]
