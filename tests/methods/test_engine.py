"""What users' LightningModules do to us: many optimizers, manual optimisation, checkpointing, wrong set-ups."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import HFT, LISA
from lightning_peft.errors import ConfigError, EffectError, PlanConflict, ScopeError, UnsupportedStrategy
from lightning_peft.methods.base import MethodCallback
from lightning_peft.strategies.guards import guard_for
from tests.contract.harness import ConvNet, Probe, TinyModule, loader, trainer


def fit(
    tmp_path: Path, module: pl.LightningModule, *callbacks: pl.Callback, data: str = "gqa_decoder", **kw: Any
) -> Any:
    run = trainer(tmp_path, callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **kw})
    run.fit(module, loader(data), loader(data, shuffle=False))
    return run


def assert_exact(probe: Probe, num_steps: int) -> None:
    assert len(probe.steps) == num_steps
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient == step.moved


# ------------------------------------------------------------------------------------------- any model


def encoder() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=19, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, num_labels=5
        )
    )


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=19, d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def vision_transformer() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=6, patch_size=3, num_channels=1, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=12, num_labels=5,
        )
    )  # fmt: skip


def plain_sequential() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(36, 8)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8)]
    return nn.Sequential(*layers, nn.Linear(8, 5))


class AnyModule(TinyModule):
    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__("conv_net")
        self.model, self.kind = model, kind

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        if self.kind == "encoder":
            return self.model(input_ids=x, labels=y).loss
        if self.kind == "encoder_decoder":
            return self.model(input_ids=x, labels=x).loss
        return nn.functional.cross_entropy(getattr(output := self.model(x), "logits", output), y)


@pytest.mark.parametrize("method", [lambda: LISA(2, period_steps=2), HFT], ids=["lisa", "hft"])
@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder", "vision_transformer", "plain_sequential"])
def test_any_kind_of_model(kind: str, method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = method()
    probe = Probe([callback])
    data = "gqa_decoder" if "encoder" in kind else "conv_net"
    fit(tmp_path, AnyModule(globals()[kind](), kind), callback, probe, data=data)
    # Dead ReLU units may leave a gradient of zero, but weight decay moves the tensor all the same.
    assert_exact(probe, 6)


class BuiltLate(TinyModule):
    """Builds its model in ``configure_model``, as FSDP users do."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        self.built, self.model = self.model, None  # type: ignore[assignment]
        self._modules.pop("built")
        self.__dict__["late"] = TinyModule("gqa_decoder").model

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.__dict__["late"]


@pytest.mark.parametrize("make", [lambda: LISA(1, period_steps=2), HFT], ids=["lisa", "hft"])
def test_model_built_in_configure_model(make: Any, tmp_path: Path) -> None:
    callback = make()
    probe = Probe([callback])
    fit(tmp_path, BuiltLate(), callback, probe)
    assert_exact(probe, 6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision: Any, tmp_path: Path) -> None:
    callback = LISA(2, period_steps=2)
    probe = Probe([callback])
    module = TinyModule("conv_net")
    fit(tmp_path, module, callback, probe, data="conv_net", precision=precision)
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient
        assert step.moved <= step.planned
    assert {p.requires_grad for p in module.parameters()} == {True}


# ------------------------------------------------------------------------------------------- optimizers


class ManualModule(TinyModule):
    """Manual optimisation with its own accumulation over two batches."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimisation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = LISA(1, period_steps=2)
    fit(tmp_path, ManualModule(), callback, accumulate_grad_batches=1, gradient_clip_val=None)
    assert [step for step, _ in callback.history] == [0, 2, 4]  # 11 batches make 5 steps


class RawManualModule(ManualModule):
    """Steps the torch optimizer itself, which Lightning's ``global_step`` does not notice, four times a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for _ in range(4):
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def test_steps_of_a_raw_optimizer_count(tmp_path: Path) -> None:
    callback = LISA(1, period_steps=8)
    fit(tmp_path, RawManualModule(), callback, accumulate_grad_batches=1, gradient_clip_val=None)
    assert len(callback.history) == 6  # 44 steps


class TwoPlayers(TinyModule):
    """A GAN's shape: two optimizers that take turns, with Lightning's toggling."""

    def __init__(self) -> None:
        super().__init__("conv_net")
        self.rival = ConvNet()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1),
            torch.optim.SGD(self.rival.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer, model in ((first, self.model), (second, self.rival)):
            if optimizer is second and batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize(
    ("scope", "draws"), [("model.blocks", 6), ("rival.blocks", 3), (["model.blocks", "rival.blocks"], 6)]
)
def test_several_optimizers_have_one_clock_each(scope: Any, draws: int, tmp_path: Path) -> None:
    callback = LISA(1, period_steps=2, scope=scope, always=("!model.blocks", "!rival.blocks", "all"))
    fit(tmp_path, TwoPlayers(), callback, data="conv_net", accumulate_grad_batches=1, gradient_clip_val=None)
    assert len(callback.history) == draws


class ZerosInPlace(TinyModule):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeroing_in_place_moves_nothing_frozen(optimizer: str, tmp_path: Path) -> None:
    callback = LISA(1, period_steps=2)
    probe = Probe([callback])
    fit(tmp_path, ZerosInPlace("gqa_decoder", optimizer), callback, probe)
    assert_exact(probe, 6)


class HeadOnly(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.lm_head.parameters(), lr=0.1)


class Doubled(TinyModule):
    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.parameters(), lr=0.1),
            torch.optim.SGD(self.model.lm_head.parameters(), lr=0.1),
        ]

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.automatic_optimization = False


class QuasiNewton(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (HeadOnly, r"planned to train are in no optimizer.*configure_optimizers"),
        (Doubled, r"1 parameter\(s\) are in more than one.*lm_head.weight"),
        (QuasiNewton, "LBFGS"),
    ],
)
def test_optimizers_that_cannot_work_are_refused_before_training(module: Any, message: str, tmp_path: Path) -> None:
    tiny = module("gqa_decoder")
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, tiny, LISA(), gradient_clip_val=None, accumulate_grad_batches=1)
    assert all(p.requires_grad for p in tiny.parameters())


class Drifting(torch.optim.SGD):
    """Decays every parameter, with or without gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return loss


class DriftingModule(TinyModule):
    def configure_optimizers(self) -> Any:
        return Drifting(self.parameters(), lr=0.1)


def test_an_optimizer_that_moves_frozen_weights_is_caught(tmp_path: Path) -> None:
    with pytest.raises(EffectError, match=r"frozen parameter.* moved .*Drifting"):
        fit(tmp_path, DriftingModule("gqa_decoder"), LISA(1))


class Warmup(TinyModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_first_step_with_learning_rate_zero_is_no_alarm(tmp_path: Path) -> None:
    callback = LISA(1, period_steps=2)
    probe = Probe([callback])
    fit(tmp_path, Warmup("gqa_decoder"), callback, probe)
    assert probe.steps[0].moved == frozenset()
    assert probe.steps[1].moved == probe.steps[1].planned


class Frozen(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None


class FrozenModule(TinyModule):
    def configure_optimizers(self) -> Any:
        return Frozen(self.parameters(), lr=0.1)


def test_an_optimizer_that_moves_nothing_is_caught(tmp_path: Path) -> None:
    with pytest.raises(EffectError, match=r"None of the .* moved"):
        fit(tmp_path, FrozenModule("gqa_decoder"), LISA(1))


class Constant(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_weight_averaging_works_beside_it(tmp_path: Path) -> None:
    callback = LISA(1, period_steps=2)
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    fit(tmp_path, Constant("conv_net"), callback, averaging, data="conv_net", max_epochs=3)
    assert len(callback.history) == 10  # the averaging adds an epoch without optimizer steps, where draw 9 begins


# ------------------------------------------------------------------------------------------- activation checkpointing


class Checkpointed(TinyModule):
    def __init__(self, use_reentrant: bool, hooked: bool) -> None:
        super().__init__("gqa_decoder")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if not hooked:  # what transformers puts on text models, and only on these
            self.model.disable_input_require_grads()
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0


class NotCheckpointed(TinyModule):
    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        for module in self.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("always", [("embeddings", "head", "norms"), ("head", "norms")], ids=["on", "off"])
@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, hooked: bool, always: Any, tmp_path: Path) -> None:
    runs = []
    for module in (NotCheckpointed(), Checkpointed(use_reentrant, hooked)):
        gradients = Gradients()
        method = LISA(1, period_steps=2, always=always)
        if use_reentrant and not hooked and "embeddings" not in always and isinstance(module, Checkpointed):
            with pytest.raises(ConfigError, match="reentrant activation checkpointing while the embeddings are frozen"):
                fit(tmp_path, module, method, gradients)
            return
        fit(tmp_path, module, method, gradients)
        runs.append(gradients.steps)
    for ours, theirs in zip(*runs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


class OwnReentrant(TinyModule):
    """Reentrant checkpointing in the user's own forward, where nothing announces it."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        x = self.model.stem(x)
        for block in self.model.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return nn.functional.cross_entropy(self.model.head(x.mean((2, 3))), y)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:4 parameter.s. are planned")
def test_blocks_without_gradient_are_an_error(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without any gradient"):
        with pytest.raises(EffectError, match="None of the units chosen to train got a gradient"):
            fit(tmp_path, OwnReentrant("conv_net"), LISA(1, always=("head",)), data="conv_net")


class LayerDrop(TinyModule):
    """Skips a block now and then, as speech models do in training."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        x = self.model.stem(x)
        for index, block in enumerate(self.model.blocks):
            if (self.global_step + index) % 4 != 0:
                x = block(x)
        return nn.functional.cross_entropy(self.model.head(x.mean((2, 3))), y)


def test_layer_drop_is_no_error(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no gradient|without any gradient"):
        fit(tmp_path, LayerDrop("conv_net"), LISA(4, period_steps=2), data="conv_net")


# ------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "arguments",
    [{"seed": None}, {"seed": 1.5}, {"scope": None}, {"scope": [3]}, {"always": None}, {"always": 2}, {"state": "kep"}],
)
def test_arguments_of_a_wrong_kind_are_configuration_errors(arguments: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        LISA(**arguments)
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        HFT(**arguments)


@pytest.mark.parametrize("redraw", [None, 0, -1, 1.5, float("inf"), "epochs", True])
def test_redraw_of_a_wrong_kind_is_a_configuration_error(redraw: Any) -> None:
    with pytest.raises(ConfigError):
        HFT(redraw=redraw)


def test_without_embeddings_back_propagation_ends_above_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = LISA(1, period_steps=2, always=("head", "norms"))
    fit(tmp_path, AnyModule(encoder(), "encoder"), callback)
    assert not [name for name in callback.selectable if "embeddings" in name]


def test_what_the_user_froze_stays_frozen_unless_named(tmp_path: Path) -> None:
    module = TinyModule("gqa_decoder")
    module.model.model.layers[1].requires_grad_(False)
    module.model.model.embed_tokens.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = LISA(2, period_steps=1)
    fit(tmp_path, module, callback)
    after = dict(module.named_parameters())
    frozen = [name for name in after if ".layers.1." in name or "embed_tokens" in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(after[name].requires_grad for name in frozen)
    assert not callback.selectable & set(frozen)

    named = LISA(2, period_steps=1, scope="model.model.layers", always=("model.lm_head",))
    fit(tmp_path, module, named)
    assert any(".layers.1." in name for name in named.selectable)
    assert not any(after[name].requires_grad for name in frozen), "the user's flags come back"


def test_a_scope_frozen_by_the_user_is_an_error(tmp_path: Path) -> None:
    module = TinyModule("gqa_decoder")
    module.requires_grad_(False)
    with pytest.raises(ScopeError, match="requires_grad=False"):
        fit(tmp_path, module, LISA())


def test_two_methods_on_disjoint_scopes(tmp_path: Path) -> None:
    lower = LISA(1, period_steps=2, scope=["model.model.layers.0", "model.model.layers.1"], always=("embeddings",))
    upper = HFT(scope=["model.model.layers.2", "model.model.layers.3"], always=("head", "norms"), redraw=3)
    probe = Probe([lower, upper])
    fit(tmp_path, TinyModule("gqa_decoder"), lower, upper, probe, max_epochs=2)
    assert_exact(probe, 12)
    assert [step for step, _ in lower.history] == [0, 2, 4, 6, 8, 10]
    assert [step for step, _ in upper.history] == [0, 3, 6, 9]
    assert not lower.selectable & upper.selectable


def test_two_methods_on_one_parameter_conflict(tmp_path: Path) -> None:
    with pytest.raises(PlanConflict, match=r"LISA\(scope='blocks'\) and HFT\(.*both claim .*layers.0"):
        fit(tmp_path, TinyModule("gqa_decoder"), LISA(), HFT(scope="model.model.layers.0"))


class Meddler(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.model.lm_head.weight.requires_grad_(False)


def test_somebody_else_toggling_is_caught(tmp_path: Path) -> None:
    with pytest.raises(EffectError, match=r"lm_head.weight"):
        fit(tmp_path, TinyModule("gqa_decoder"), LISA(1, period_steps=2), Meddler(), accumulate_grad_batches=1)


def test_unsupported_strategies_are_refused_before_training() -> None:
    class OtherStrategy(Strategy):
        pass

    OtherStrategy.__abstractmethods__ = frozenset()
    for strategy, words in [
        (OtherStrategy(), "OtherStrategy is not supported"),
        (FSDPStrategy(use_orig_params=False), "use_orig_params=True"),
    ]:
        with pytest.raises(UnsupportedStrategy, match=words):
            guard_for(strategy)


class Interrupt(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise RuntimeError("power cut")


def test_an_exception_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, module, LISA(1, always=("head",)), Interrupt(), data="conv_net")
    assert all(p.requires_grad for p in module.parameters())
    assert all(part.training for part in module.modules())


def test_describe_counts_parameters(tmp_path: Path) -> None:
    callback: MethodCallback = LISA(2, period_steps=100)
    module = TinyModule("gqa_decoder")
    fit(tmp_path, module, callback)
    numels = {name: p.numel() for name, p in module.named_parameters()}
    description = callback.describe()
    assert description["num_selectable_parameters"] == sum(numels.values())
    assert description["num_trainable_parameters"] == sum(numels[name] for name in callback.trainable_names)
    assert len(description["active_units"]) == 2
    assert all(re.fullmatch(r"model\.model\.layers\.\d", unit) for unit in description["active_units"])
    assert description["settings"]["always"] == ["embeddings", "head", "norms"]


def test_compiled_model_keeps_names_and_the_plan(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    module.model = torch.compile(module.model, backend="eager")  # type: ignore[assignment]
    callback = LISA(2, period_steps=2)
    probe = Probe([callback])
    probe.methods = []  # names differ: the probe sees those with the wrapper
    fit(tmp_path, module, callback, probe, data="conv_net")
    assert all("_orig_mod" not in name for name in callback.selectable)
    for step, (_, names) in zip(probe.steps[::2], callback.history, strict=True):
        assert {name.replace("_orig_mod.", "") for name in step.moved} == names
