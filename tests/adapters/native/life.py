"""What every native method must survive: identity, training, files, merging; and a fit that is resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from tests.adapters.native.models import build, loss, output
from tests.adapters.native.test_in_training import Module, fit, loader


def live(base: Any, x: Tensor, config: Any, count: int, folder: Path, *, merges: bool = True) -> Any:
    """Adapters of ``config`` on ``base``: ``count`` values train, the model starts as its base. Returns the handle."""
    before = {name: value.clone() for name, value in base.state_dict().items()}
    base.eval()
    expected = output(base, x)
    handle: Any = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    handle.eval()
    assert torch.equal(output(handle, x), expected)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == count > 0

    start = {name: p.detach().clone() for name, p in handle.named_parameters()}
    optimizer = torch.optim.Adam([p for p in handle.parameters() if p.requires_grad], lr=1e-2)
    first = loss(handle, x)
    for _ in range(3):
        optimizer.zero_grad()
        loss(handle, x).backward()
        optimizer.step()
    assert loss(handle, x) < first
    still = [name for name, p in handle.named_parameters() if torch.equal(p, start[name]) == p.requires_grad]
    assert not still, f"moved though frozen, or did not move though trained: {still}"
    trained = output(handle, x)
    with handle.disable_adapter():
        assert torch.equal(output(handle, x), expected)
    assert torch.equal(output(handle, x), trained)

    handle.save_pretrained(folder)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True, "adapter_name": "again"}):
        loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), folder, **options).eval()  # type: ignore[arg-type]
        torch.testing.assert_close(output(loaded, x), trained, rtol=1e-5, atol=1e-6)  # other kernels without gradients
        trains = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
        assert trains == (count if "is_trainable" in options else 0)
    if merges:
        handle.merge_adapter()
        torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-4)
        handle.unmerge_adapter()
        torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-4)
        merged: Any = copy.deepcopy(handle).merge_and_unload(safe_merge=True)
        torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-4)
        assert type(merged) is type(base)
        assert set(before) <= set(merged.state_dict())
    return handle


def resume(make: Callable[[], list[Any]], folder: Path) -> tuple[Module, Any]:
    """A resumed fit is the one that was not stopped; its checkpoint holds no base. Returns module and Trainer."""
    whole, trainer = fit(make(), folder, 6)
    assert len(set(whole.losses)) == 6
    _, half = fit(make(), folder, 3)
    half.save_checkpoint(folder / "half.ckpt")
    resumed, _ = fit(make(), folder, 6, folder / "half.ckpt")
    assert resumed.losses == whole.losses[-3:]
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    callback: Any = trainer.callbacks[0]  # type: ignore[attr-defined]
    saved = torch.load(folder / "half.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(f".{callback.method}_" in name for name in saved)
    callback.export(folder / "peft")
    loaded = PeftModel.from_pretrained(build("vit"), folder / "peft").eval()
    x = next(iter(loader()))[0]
    torch.testing.assert_close(output(loaded, x), output(whole.model.eval(), x), rtol=1e-5, atol=1e-6)
    return whole, trainer
