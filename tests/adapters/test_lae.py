"""LAE over three tasks: what trains, how the copy follows, what the ensemble says, and exact resume inside a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel

from lightning_peft import LAE, load_from_checkpoint
from lightning_peft.adapters.lae import ensemble
from lightning_peft.errors import ConfigError
from tests.adapters.test_adapter import SaveAll, fit, pytestmark  # noqa: F401
from tests.contract.harness import Probe, TinyModule, assert_same_weights, loader, trainer, weights

DATA = "conv_net"


def lae(**options: Any) -> LAE:
    given = {"decay": 0.75, "freeze_epochs": 1, "layers": "*.conv", "always": ["head"], **options}
    return LAE("lora", {"r": 2}, **given)


class Asked(TinyModule):
    """Keeps what validation got from the model."""

    def __init__(self, model: str = DATA) -> None:
        super().__init__(model)
        self.answers: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.answers.append(self.model(batch[0]).clone())


class Follows(pl.Callback):
    def __init__(self) -> None:
        self.values: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.values.append(weights(pl_module))


def run_task(path: Path, module: TinyModule, *callbacks: Any, ckpt: Path | None = None) -> pl.Trainer:
    torch.manual_seed(1 if ckpt is None else 9)
    run = trainer(path, callbacks, max_epochs=2)
    run.fit(module, loader(DATA), loader(DATA, shuffle=False), ckpt_path=ckpt)
    return run


def split(values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    offline = {name.replace("default_offline", "default"): v for name, v in values.items() if "_offline" in name}
    return {name: (values[name], value) for name, value in offline.items()}


def test_three_tasks(tmp_path: Path) -> None:
    module, adapter = Asked(), lae()
    for task in range(3):
        probe, follows = Probe([adapter]), Follows()
        module.answers.clear()
        folder = tmp_path / str(task)
        run = run_task(folder, module, adapter, probe, follows, SaveAll(folder))
        assert adapter.task == task
        assert len(follows.values) == 13

        # what trains: in the first epoch of a later task the head alone; never the copy
        for at, step in enumerate(probe.steps):
            assert step.planned == step.requires_grad == step.with_gradient
            assert any("lora" in name for name in step.planned) == (task == 0 or at >= 6)
            assert {"model.head.weight", "model.head.bias"} <= step.planned
            assert not any("offline" in name for name in step.planned)

        # how the copy follows
        for before, after in zip(follows.values, follows.values[1:], strict=False):
            old, new = split(before), split(after)
            assert len(new) == 8
            for name, (online, offline) in new.items():
                expected = online if task == 0 else 0.75 * old[name][1] + 0.25 * online
                torch.testing.assert_close(offline, expected, rtol=1e-6, atol=1e-8)
        pairs = split(follows.values[-1])
        assert any(not torch.equal(*pair) for pair in pairs.values()) == (task > 0)

        # what the ensemble says, against each expert by itself
        module.answers.clear()
        run.validate(module, loader(DATA, shuffle=False), verbose=False)
        x = next(iter(loader(DATA, shuffle=False)))[0]
        final = weights(module)
        with torch.no_grad():
            first = module.eval().model(x).softmax(1)
            swapped = {n.replace("_offline.", "."): v for n, v in final.items() if "_offline" in n}
            module.load_state_dict({**final, **swapped})
            second = module.model(x).softmax(1)
            module.load_state_dict(final)
        module.train()
        torch.testing.assert_close(module.answers[0].exp(), torch.maximum(first, second), rtol=1e-5, atol=1e-6)
        assert (float((first - second).abs().max()) > 1e-4) == (task > 0)
        assert [m.active_adapters for m in module.modules() if hasattr(m, "lora_A")] == [["default"]] * 4

    # resume inside the last task, frozen and not
    before_task = torch.load(tmp_path / "1" / "021.ckpt", weights_only=True)["state_dict"]
    assert any("_offline" in name for name in before_task)
    for point in ("2/004.ckpt", "2/014.ckpt"):
        again = lae()
        fresh = Asked()
        run_task(tmp_path, fresh, again, ckpt=tmp_path / point)
        assert again.task == 2
        assert_same_weights(weights(fresh), final)


def test_files(tmp_path: Path) -> None:
    module, adapter = Asked(), lae(freeze_epochs=0)
    run_task(tmp_path, module, adapter)
    run = run_task(tmp_path, module, adapter)
    run.save_checkpoint(tmp_path / "two.ckpt")
    loaded = load_from_checkpoint(Asked, tmp_path / "two.ckpt")
    assert_same_weights(weights(loaded), weights(module))
    x = next(iter(loader(DATA)))[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(x), module.eval().model(x))  # the online expert
    fresh, judge = Asked(), lae(freeze_epochs=0)
    trainer(tmp_path, [judge]).validate(
        fresh, loader(DATA, shuffle=False), ckpt_path=tmp_path / "two.ckpt", verbose=False, weights_only=True
    )
    module.answers.clear()
    run.validate(module, loader(DATA, shuffle=False), verbose=False)
    assert torch.equal(fresh.answers[0], module.answers[0])  # both experts come out of a file
    adapter.handle.save_pretrained(str(tmp_path / "peft"), selected_adapters=[adapter.offline_name])
    base = Asked().model
    base.head.load_state_dict(module.model.head.state_dict())  # pyright: ignore
    assert PeftModel.from_pretrained(base, str(tmp_path / "peft" / adapter.offline_name)) is not None


def test_language_models_and_other_methods(tmp_path: Path) -> None:
    adapter = LAE(
        "ia3", {"target_modules": ["k_proj"], "feedforward_modules": []}, layers=None, freeze_epochs=0, decay=0.5
    )
    module, _ = fit(tmp_path, adapter)
    fit(tmp_path, adapter, module=module)
    assert adapter.task == 1
    pairs = split(weights(module))
    assert len(pairs) == 4
    assert all(not torch.equal(*pair) for pair in pairs.values())


def test_ensemble_is_the_larger_probability() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    expected = [[max(p, q) for p, q in zip(x, y, strict=True)] for x, y in zip(a.softmax(1), b.softmax(1), strict=True)]
    torch.testing.assert_close(ensemble(a, b).exp(), torch.tensor(expected))
    torch.testing.assert_close(ensemble(a, a), a.log_softmax(1))


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decay=1\.5"):
        LAE(decay=1.5)
    with pytest.raises(ConfigError, match="no layers in the model"):
        LAE("prompt_tuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, layers=None)
    with pytest.raises(ConfigError, match="AdaLoRADriver"):
        fit(tmp_path, LAE("adalora", {"total_step": 6}))
    module, adapter = TinyModule(DATA), lae(always=())
    run_task(tmp_path, module, adapter)
    with pytest.raises(ConfigError, match="Name the head in always"):
        run_task(tmp_path, module, adapter)

    class Features(Asked):
        def __init__(self) -> None:
            super().__init__()
            forward = self.model.forward
            self.model.forward = lambda x: (forward(x), None)  # type: ignore[method-assign]

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0])[0], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    module, adapter = Features(), lae(freeze_epochs=0)
    run_task(tmp_path, module, adapter)
    with pytest.raises(ConfigError, match="it returns a tuple"):
        run_task(tmp_path, module, adapter)
