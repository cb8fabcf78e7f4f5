"""Under ``torch.compile``, switching must not recompile without bound.

Compiled block by block, as users do, blocks of one class share what is compiled for them: a frozen and an active
variant, and these once more for blocks whose input needs no gradient, where the embeddings are frozen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_peft import (
    HFT,
    IST,
    LISA,
    AutoRGN,
    BAdam,
    BitFit,
    DropBP,
    EmbeddingsAndHead,
    FinetuningSchedule,
    GradualUnfreezing,
    GreenTrainer,
    LastLayer,
    RandomTuning,
    RiFT,
    Surgical,
    Telly,
)
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.compiled import CompiledSelections, compiled_modules
from tests.contract.harness import (
    NUM_LAYERS,
    Probe,
    TinyModule,
    assert_same_weights,
    gqa_decoder,
    loader,
    trainer,
    weights,
)

# dynamo looks at `.grad` of what it compiles, and torch warns where that is not a leaf
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # dynamo of torch 2.11 does this to every custom function
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

MAX_EPOCHS, NUM_STEPS = 4, 24


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Far from PyTorch's limit of 8 variants, above which it stops compiling and a count says nothing."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def blocks_of(module: TinyModule) -> Any:
    model: Any = module.model
    return model.model.layers if module.is_language_model else model.blocks


def run(tmp_path: Path, module: TinyModule, model: str, methods: list[MethodCallback]) -> tuple[Any, Probe]:
    probe = Probe([])
    torch.manual_seed(0)
    fit = trainer(tmp_path, [*methods, probe], max_epochs=MAX_EPOCHS, accumulate_grad_batches=2, limit_val_batches=0)
    fit.fit(module, loader(model), loader(model, shuffle=False))
    return fit, probe


def without_wrapper(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("._orig_mod", ""): value for name, value in values.items()}


def swaps() -> dict[int, Any]:
    """Twenty phases of whole blocks, of which one or two train."""
    pairs = ["*.[01].*", "*.2.*", "*.[13].*", "*.0.*"]
    ends = {n: {"max_steps": 1} for n in range(20)}
    return {n: {"only": [pairs[n % 4], "head"], "lr": 1e-3, **ends.get(n, {})} for n in range(21)}


ALWAYS = ("embeddings", "head", "norms")
BLOCKWISE: dict[str, tuple[Callable[[], MethodCallback], int, int]] = {
    # How many draws there are, and how many variants may be compiled for all blocks together.
    "lisa": (lambda: LISA(2, period_steps=1), 24, 2),
    "lisa_head_only": (lambda: LISA(1, period_steps=1, always=("head",)), 24, 4),
    "lisa_offload": (lambda: LISA(1, period_steps=1, state="offload"), 24, 2),
    "hft_layer": (lambda: HFT(granularity="layer", redraw=1), 24, 2),
    "ist": (lambda: IST(0.5, score_period_steps=2, scope="blocks", always=ALWAYS), 24, 2),
    "ist_blocks_only": (lambda: IST(0.5, score_period_steps=2, scope="blocks", score_on="train"), 24, 4),
    "badam": (lambda: BAdam(period_steps=1), 24, 4),
    "badam_always": (lambda: BAdam("descending", period_steps=1, always=ALWAYS), 24, 2),
    "dropbp": (lambda: DropBP(0.4), 24, 4),
    "schedule": (lambda: FinetuningSchedule(swaps()), 21, 4),
    "gradual_unfreezing": (lambda: GradualUnfreezing(period_steps=3), 6, 4),
    # Norms and biases do not train, so that a block has one pattern; its input needs a gradient or not.
    "rift": (lambda: RiFT(epochs=1, num_batches=1, interpolation_steps=2, score_on="train"), 1, 4),
    "auto_rgn": (lambda: AutoRGN(num_batches=1), 4, 1),
    "telly": (lambda: Telly(2), 1, 4),
    "bitfit": (lambda: BitFit(scope=["biases", "norms"]), 1, 2),
    "embeddings_and_head": (lambda: EmbeddingsAndHead(), 1, 1),
    "last_layer": (lambda: LastLayer(), 1, 4),
    "surgical": (lambda: Surgical(1, 2), 1, 4),
}


@pytest.mark.parametrize("row", BLOCKWISE)
def test_whole_blocks_share_a_frozen_and_an_active_variant(row: str, tmp_path: Path) -> None:
    make, draws, variants = BLOCKWISE[row]
    plain, method = TinyModule("gqa_decoder"), make()
    run(tmp_path, plain, "gqa_decoder", [method])
    counter = CompileCounterWithBackend("eager")
    module, method = TinyModule("gqa_decoder"), make()
    blocks = blocks_of(module)
    for index in range(NUM_LAYERS):
        blocks[index] = torch.compile(blocks[index], backend=counter)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile: ")
        _, probe = run(tmp_path, module, "gqa_decoder", [method])
    assert len(method.history) == draws
    assert len({names for _, names in method.history}) >= min(4, draws if row != "auto_rgn" else 1)
    assert 1 <= counter.frame_count <= variants
    history = dict(method.history)
    planned: frozenset[str] = frozenset()
    for number, step in enumerate(probe.steps):
        planned = history.get(number, planned)
        assert {name.replace("._orig_mod", "") for name in step.moved} == planned
    assert_same_weights(without_wrapper(weights(module)), weights(plain))


@pytest.mark.parametrize("model", ["conv_net", "gqa_decoder"])
def test_gradients_compile_in_two_variants_too(model: str, tmp_path: Path) -> None:
    """Resting and active, over 24 switches; batch norms of resting blocks are in evaluation mode."""
    counter = CompileCounterWithBackend("aot_eager")
    module, method = TinyModule(model), LISA(2, period_steps=1)
    blocks = blocks_of(module)
    for index in range(NUM_LAYERS):
        blocks[index] = torch.compile(blocks[index], backend=counter)
    _, probe = run(tmp_path, module, model, [method])
    assert len(method.history) == NUM_STEPS
    assert len({names for _, names in method.history}) > 4, "too few different selections to say anything"
    assert counter.frame_count == 2
    for step, (_, names) in zip(probe.steps, method.history, strict=True):
        assert {name.replace("._orig_mod", "") for name in step.moved} == names


PARTWISE: dict[str, Callable[[], MethodCallback]] = {
    "hft": lambda: HFT(redraw=1),
    "random_tuning": lambda: RandomTuning(0.3, redraw=1),
    "green_trainer": lambda: GreenTrainer(0.6, redraw=1),
}


@pytest.mark.parametrize("row", PARTWISE)
def test_parts_of_blocks_need_a_variant_each_and_that_is_said(row: str, tmp_path: Path) -> None:
    """Past PyTorch's limit blocks run uncompiled: slower, and right."""
    plain, method = TinyModule("gqa_decoder"), PARTWISE[row]()
    run(tmp_path, plain, "gqa_decoder", [method])
    module, method = TinyModule("gqa_decoder"), PARTWISE[row]()
    counter = CompileCounterWithBackend("eager")
    for block in blocks_of(module):
        block.compile(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=False):
        with pytest.warns(UserWarning, match=r"torch.compile: LlamaDecoderLayer has had \d+ .*after 3 runs uncompiled"):
            run(tmp_path, module, "gqa_decoder", [method])
    assert counter.frame_count == 3
    assert_same_weights(weights(module), weights(plain))


def test_a_model_compiled_as_a_whole_is_told_to_be_compiled_by_blocks(tmp_path: Path) -> None:
    module = TinyModule("gqa_decoder")
    module.model.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        with pytest.warns(UserWarning, match="LlamaForCausalLM.*compile it block by block"):
            run(tmp_path, module, "gqa_decoder", [LISA(1, period_steps=1)])


def test_compiled_parts_are_found_however_they_are_compiled() -> None:
    model: Any = gqa_decoder()
    assert compiled_modules(model) == []
    first, second = model.model.layers[0], model.model.layers[1]
    first.compile(backend="eager")
    model.model.layers[1] = torch.compile(second, backend="eager")
    assert compiled_modules(model) == [first, second]
    whole = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert compiled_modules(whole) == [whole._orig_mod]  # type: ignore[attr-defined]


def test_selections_are_counted_by_class_and_warned_of_once() -> None:
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)), nn.LayerNorm(2))
    for layer in layers:
        layer.compile(backend="eager")
    seen = CompiledSelections(layers)
    with torch._dynamo.config.patch(recompile_limit=3), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count, flags in enumerate([(True, True), (False, False), (True, False), (False, True), (True, True)]):
            for layer in layers:
                for parameter, flag in zip(layer.parameters(), flags, strict=True):
                    parameter.requires_grad_(flag)
            seen.note()
            assert len(caught) == (0 if count < 3 else 2)
    assert "Linear has had 4" in str(caught[0].message)
    assert "let whole blocks train" in str(caught[0].message)
    assert "LayerNorm has had 4" in str(caught[1].message)
    assert "block by block" in str(caught[1].message)
