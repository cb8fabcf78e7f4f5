"""Under ``torch.compile``, switching must not recompile without bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_peft import LISA
from tests.contract.harness import NUM_LAYERS, Probe, TinyModule, loader, trainer


# dynamo looks at `.grad` of what it compiles, and torch warns where that is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("model", ["conv_net", "gqa_decoder"])
def test_blocks_compile_in_two_variants_at_most(model: str, tmp_path: Path) -> None:
    """Compiled block by block: resting and active, over 20 switches."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = TinyModule(model)
    blocks: Any = module.model.blocks if model == "conv_net" else module.model.model.layers
    for index in range(NUM_LAYERS):
        blocks[index] = torch.compile(blocks[index], backend=counter)
    method = LISA(2, period_steps=1)
    probe = Probe([])
    run = trainer(tmp_path, [method, probe], max_epochs=4, accumulate_grad_batches=2, limit_val_batches=0)
    run.fit(module, loader(model), loader(model, shuffle=False))
    sets = {names for _, names in method.history}
    assert len(method.history) == 24
    assert len(sets) > 4, "too few different selections to say anything"
    # Every batch is full but the epochs' last ones, which are of the same size here.
    assert 2 <= counter.frame_count <= 2 * NUM_LAYERS
    for step, (_, names) in zip(probe.steps, method.history, strict=True):
        assert {name.replace("._orig_mod", "") for name in step.moved} == names
    torch._dynamo.reset()
