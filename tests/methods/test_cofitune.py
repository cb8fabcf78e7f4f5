"""CoFiTune: the exact product, importance against real unit masks, masks on the right axis, what Adam makes of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_peft import CoFiTune
from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.heads import find_heads, spread_over_heads
from lightning_peft.methods.layers.cofitune import (
    _dropout_behind,
    disagreement,
    head_scores,
    unit_importance,
    unit_scores,
)
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.projections import find_projections, layers_in_range, output_axis_mask, product_of
from tests.contract.harness import MODELS, TinyModule, assert_same_weights, dataset, loader, trainer, weights
from tests.core.test_blocks import model_of, structure_of

MLP = ("up", "down")


def fit(method: Any, tmp_path: Path, model: str = "gqa_decoder", module: Any = None, **kw: Any) -> TinyModule:
    torch.manual_seed(0)
    module = module or TinyModule(model)
    trainer(tmp_path, [method] if method else [], **kw).fit(module, loader(model), loader(model, shuffle=False))
    return module


class Told(CoFiTune):
    """Is told the importance of units instead of measuring it."""

    told: dict[str, Tensor]

    def observe(self, moment: Moment) -> None:
        if self.soft_mask != "none":
            self._importance = {unit: self.told[unit] for unit in self._projections}


def told(importance: dict[str, Tensor], **arguments: Any) -> Told:
    method = Told(**arguments)
    method.told = importance
    return method


# ---------------------------------------------------------------------------------------------------- coarse


@pytest.mark.parametrize(("num_layers", "expected"), [(32, range(8, 16)), (40, range(10, 20)), (60, range(15, 30))])
def test_the_second_quarter_is_the_authors(num_layers: int, expected: range) -> None:
    """Their scripts list layers 8-15 of the 7B model, 10-19 of the 13B, 15-29 of the 33B."""
    assert layers_in_range(num_layers, (0.25, 0.5)) == expected


@given(num_layers=st.integers(1, 100), cuts=st.lists(st.integers(1, 19), max_size=4, unique=True))
def test_adjacent_ranges_tile_the_stack(num_layers: int, cuts: list[int]) -> None:
    edges = [0.0, *(cut / 20 for cut in sorted(cuts)), 1.0]
    ranges = [layers_in_range(num_layers, pair) for pair in itertools.pairwise(edges)]
    assert all(len(part) >= 1 for part in ranges)
    assert set().union(*ranges) == set(range(num_layers))
    if num_layers >= 20:
        assert sum(map(len, ranges)) == num_layers


FEED_FORWARD = {
    "llama": {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"},
    "gpt2": {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"},
    "mixtral": {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"},
    "bert": {"bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"},
    "t5": {
        "encoder.block.1.layer.1.DenseReluDense.wi",
        "encoder.block.1.layer.1.DenseReluDense.wo",
        "decoder.block.1.layer.2.DenseReluDense.wi",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    },
    "vit": {"vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"},
    "whisper": {f"model.{side}.layers.1.fc{i}" for side in ("encoder", "decoder") for i in (1, 2)},
    "mamba": {"backbone.layers.1.mixer.in_proj", "backbone.layers.1.mixer.out_proj"},
}
ATTENTION = {
    "llama": {f"model.layers.1.self_attn.{n}_proj": k for n, k in zip("qkvo", ("query", "key", "value", "output"))},  # noqa: B905
    "gpt2": {"transformer.h.1.attn.c_attn": "qkv", "transformer.h.1.attn.c_proj": "output"},
    "bert": {
        "bert.encoder.layer.1.attention.self.query": "query",
        "bert.encoder.layer.1.attention.self.key": "key",
        "bert.encoder.layer.1.attention.self.value": "value",
        "bert.encoder.layer.1.attention.output.dense": "output",
    },
    "mamba": {},
}


def expand(structure: Structure, units: set[str]) -> set[str]:
    found = {n for n in structure.parameters for unit in units if n == unit or n.startswith(f"{unit}.")}
    assert all(any(n == u or n.startswith(f"{u}.") for n in structure.parameters) for u in units)
    return found


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_the_feed_forward_is_found_on_every_architecture(name: str) -> None:
    structure = structure_of(name)
    counts = [sum(b.stack == stack for b in structure.blocks) for stack in structure.stacks]
    assert set(counts) in ({2}, {3})
    second = (0.34, 0.67) if counts[0] == 3 else (0.5, 1.0)
    method = CoFiTune(layer_range=second)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    assert method.selectable == expand(structure, FEED_FORWARD[name])


@pytest.mark.parametrize("name", ATTENTION)
def test_kinds_of_attention(name: str) -> None:
    found = {p.unit: p.kind for p in find_projections(structure_of(name)) if p.kind not in ("up", "gate", "down")}
    assert {unit: kind for unit, kind in found.items() if ".1." in unit} == ATTENTION[name]


def test_up_and_gate_are_told_apart() -> None:
    kinds = {p.unit.rpartition(".")[2]: p.kind for p in find_projections(structure_of("llama"))}
    assert kinds["gate_proj"] == "gate"
    assert kinds["up_proj"] == "up"
    from transformers import T5Config, T5Model

    gated = T5Model(T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, is_gated_act=True))
    kinds = {p.unit.rpartition(".")[2]: p.kind for p in find_projections(find_structure(gated))}
    assert [kinds[leaf] for leaf in ("wi_0", "wi_1", "wo")] == ["gate", "up", "down"]


@pytest.fixture(scope="module")
def deep() -> Structure:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=40, num_attention_heads=2)
    return find_structure(LlamaModel(config))


def test_layer_1_is_not_layers_10_to_19(deep: Structure) -> None:
    names = {n for unit in product_of(deep, (0.025, 0.05), ["ffn"]).values() for n in unit}
    assert names == {f"layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


def test_the_trainable_set_is_the_product(deep: Structure) -> None:
    method = CoFiTune(modules=["up_proj", "key", "input_layernorm", "mlp.down_proj"])
    method.bind(deep, dict.fromkeys(deep.parameters, True))
    leaves = ("mlp.up_proj", "mlp.down_proj", "self_attn.k_proj", "input_layernorm")
    assert method.selectable == {f"layers.{index}.{leaf}.weight" for index in range(10, 20) for leaf in leaves}
    everything = CoFiTune((0.0, 1.0), ["all"], soft_mask="none")
    everything.bind(deep, dict.fromkeys(deep.parameters, True))
    assert everything.selectable == set(deep.roles["blocks"])
    narrowed = CoFiTune((0.0, 1.0), ["up"], scope="layers.3")
    narrowed.bind(deep, dict.fromkeys(deep.parameters, True))
    assert narrowed.selectable == {"layers.3.mlp.up_proj.weight"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_of_the_kind_of_their_layer() -> None:
    structure = structure_of("lora")
    flags = {name: parameter.requires_grad for name, parameter in structure.parameters.items()}
    for modules in (["attention"], ["query", "value"], ["q_proj", "self_attn.v_proj"]):
        method = CoFiTune((0.34, 0.67), modules, soft_mask="none", scope="adapters")
        method.bind(structure, flags)
        found = method.selectable
        assert found == {n for n, trains in flags.items() if trains and ".layers.1." in n}
        assert len(found) == 4
    with pytest.raises(ConfigError, match="soft_mask='none'"):
        CoFiTune((0.34, 0.67), ["query"], scope="adapters").bind(structure, flags)


def test_everything_else_stays(tmp_path: Path) -> None:
    before = weights(TinyModule("gqa_decoder"))
    after = weights(fit(CoFiTune(num_batches=2), tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.model.layers.1.mlp.{kind}_proj.weight" for kind in ("up", "down")}


# ---------------------------------------------------------------------------------------------------- importance


def masked_gradients(module: Any, structure: Structure, batch: Any, rate: float) -> dict[str, Tensor]:
    """The definition: factors of 1 on every unit's response in two passes, and the gradient of their divergence."""
    masks: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for projection in find_projections(structure):
            owner = structure.modules[projection.unit]
            weight = structure.parameters[projection.weight]
            if projection.kind == "output":
                heads = torch.ones(4 if "layers" in projection.unit else 2, requires_grad=True)
                masks[f"heads {projection.unit}"] = heads

                def scale_in(m: nn.Module, args: Any, mask: Tensor = heads) -> Any:
                    return (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)), *args[1:])

                stack.callback(owner.register_forward_pre_hook(scale_in).remove)
            units = torch.ones(weight.shape[projection.out_axis], requires_grad=True)
            masks[projection.unit] = units

            def scale_out(m: nn.Module, args: Any, output: Tensor, mask: Tensor = units) -> Tensor:
                return output * mask

            stack.callback(owner.register_forward_hook(scale_out).remove)
        stack.enter_context(_dropout_behind(structure, rate))
        first, second = (module.model(input_ids=batch[0], use_cache=False).logits for _ in range(2))
        loss = nn.functional.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="sum")
        grads = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
    return {k: torch.zeros_like(m) if g is None else g for (k, m), g in zip(masks.items(), grads, strict=True)}


@pytest.mark.parametrize("model", ["gqa_decoder", "tied_decoder"])
def test_scores_are_gradients_of_unit_masks(model: str) -> None:
    """Row sums of weight times gradient are the gradient of a mask on the rows' output, of every projection."""
    module = TinyModule(model).train()
    structure = find_structure(module)
    batch = dataset(model).tensors
    torch.manual_seed(0)
    expected = masked_gradients(module, structure, batch, 0.1)
    torch.manual_seed(0)
    with _dropout_behind(structure, 0.1):
        first, second = (module.model(input_ids=batch[0], use_cache=False).logits for _ in range(2))
    projections = find_projections(structure)
    names = [name for p in projections for name in p.members]
    grads = torch.autograd.grad(disagreement(first, second), [structure.parameters[n] for n in names])
    gradient = dict(zip(names, grads, strict=True))
    assert len(projections) >= 4 * 4
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 0
    for p in projections:
        weight = structure.parameters[p.weight]
        found = unit_scores(weight, gradient[p.weight], p.out_axis)
        for bias in p.members[1:]:
            found = found + structure.parameters[bias].detach() * gradient[bias]
        torch.testing.assert_close(found, expected[p.unit], rtol=1e-3, atol=1e-5 * largest)
        if p.kind == "output":
            heads = expected[f"heads {p.unit}"]
            assert float(heads.abs().max()) > 0
            found = head_scores(weight, gradient[p.weight], p.out_axis, len(heads))
            torch.testing.assert_close(found, heads, rtol=1e-3, atol=1e-5 * largest)


def test_scores_of_experts() -> None:
    """Each expert has units of its own, in either layout of the fused tensor."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(3, 5, 4, generator=generator) for _ in range(2))
    expected = torch.stack([torch.stack([(weight[e, j] * grad[e, j]).sum() for j in range(5)]) for e in range(3)])
    torch.testing.assert_close(unit_scores(weight, grad, 1), expected)
    torch.testing.assert_close(unit_scores(weight.mT.contiguous(), grad.mT.contiguous(), 2), expected)
    kernel = torch.randn(6, 2, 3, 3, generator=generator)
    torch.testing.assert_close(unit_scores(kernel, kernel, 0), kernel.square().sum((1, 2, 3)))


@given(seed=st.integers(0, 999), size=st.integers(3, 30), scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3))
def test_importance_is_a_standardised_magnitude(seed: int, size: int, scale: float, shift: float) -> None:
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    found = unit_importance(scores)
    z = (scores - scores.mean()) / scores.std()
    torch.testing.assert_close(found, z.tanh().abs())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    torch.testing.assert_close(unit_importance(scale * (scores + shift)), found, rtol=1e-2, atol=1e-2)


def test_units_that_are_alike_are_free() -> None:
    assert torch.equal(unit_importance(torch.full((4,), 0.3)), torch.zeros(4))
    assert torch.equal(unit_importance(torch.ones(1)), torch.zeros(1))


def test_grouped_heads_take_the_most_important_query_head() -> None:
    heads = torch.tensor([0.1, 0.9, 0.0, 0.2])
    assert spread_over_heads(heads, 4, 8).tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9, 0, 0, 0.2, 0.2])
    assert spread_over_heads(heads, 2, 4).tolist() == pytest.approx([0.9, 0.9, 0.2, 0.2])
    assert spread_over_heads(heads, 1, 2).tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize(("model", "modules"), [(m, ["ffn", "attention"]) for m in MODELS if m != "conv_net"])
def test_importance_in_a_fit(model: str, modules: list[str], tmp_path: Path) -> None:
    """Against the definition on all training samples in one batch, with the method's own dropout noise."""
    from lightning_peft.core.draw import draw_generator
    from lightning_peft.data.loader import ResumableDataLoader

    batches: list[Tensor] = []

    class Recorded(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    data = dataset(model)
    method = CoFiTune((0.0, 0.25), modules, num_batches=1, dropout=0.2, seed=3)
    module = Recorded(model)
    start = copy.deepcopy(module).train()
    whole = ResumableDataLoader(data, batch_size=len(data), shuffle=False)
    trainer(tmp_path, [method], limit_train_batches=1, limit_val_batches=0, max_epochs=1).fit(module, whole, whole)
    structure = find_structure(start)
    assert len(batches) == 3  # two passes to compare, and the one training step
    assert torch.equal(batches[0], batches[1])
    torch.manual_seed(draw_generator(3, 0, "dropout").initial_seed())
    expected = masked_gradients(start, structure, batches, 0.2)
    assert set(method.importance) == {p.unit for p in find_projections(structure) if p.block.endswith(".0")}
    for unit, values in method.importance.items():
        kind = next(p.kind for p in find_projections(structure) if p.unit == unit)
        if kind in ("query", "key", "value", "qkv"):
            heads = next(v for k, v in expected.items() if k.startswith("heads") and ".0." in k)
            importance = unit_importance(heads)
            if kind in ("key", "value"):
                importance = importance.view(2, 2).amax(1)
            parts = 3 if kind == "qkv" else 1
            wanted = importance.repeat_interleave(len(values) // len(importance) // parts).repeat(parts)
        else:
            wanted = unit_importance(expected[unit])
        torch.testing.assert_close(values, wanted, rtol=2e-3, atol=2e-3, msg=f"{unit}: {values} {wanted}")


def test_padding_does_not_count() -> None:
    first, second = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    kept = mask.bool()
    p, q = second.softmax(-1)[kept], first.softmax(-1)[kept]
    torch.testing.assert_close(disagreement(first, second, mask), (p * (p / q).log()).sum())
    torch.testing.assert_close(disagreement(first, second), disagreement(first, second, torch.ones(3, 5)))


class Rows(torch.utils.data.Dataset):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


class AnyModel(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).logits.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("name", FEED_FORWARD)
def test_importance_on_every_architecture(name: str, tmp_path: Path) -> None:
    """Of every projection, heads included; what stays frozen (here the output projections) is needed to measure."""
    model: Any = model_of(name)
    ids = torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(0))
    columns = {"input_ids": ids}
    if name == "vit":
        columns = {"pixel_values": torch.randn(4, 3, 8, 8)}
    elif name == "whisper":
        config = model.config
        features = torch.randn(4, config.num_mel_bins, 2 * config.max_source_positions)
        columns = {"input_features": features, "decoder_input_ids": ids}
    elif name == "t5":
        columns = {"input_ids": ids, "decoder_input_ids": ids}
    modules = ["ffn"] if name == "mamba" else ["ffn", "qkv" if name == "gpt2" else "value"]
    method = CoFiTune((0.0, 1.0), modules, num_batches=2, dropout=0.1)
    module = AnyModel(model)
    loader = torch.utils.data.DataLoader(Rows(columns), batch_size=2)
    trainer(tmp_path, [method], max_epochs=1, limit_val_batches=0).fit(module, loader)
    structure = find_structure(module)
    assert set(method.importance) == {p.unit for p in find_projections(structure) if p.kind in {*modules, *MLP, "gate"}}
    for p in find_projections(structure):
        if p.unit in method.importance:
            values = method.importance[p.unit]
            assert values.shape[-1] == structure.parameters[p.weight].shape[p.out_axis]
            assert float(values.max()) > 0
            assert float(values.max()) <= 1
            mask = output_axis_mask(values, structure.parameters[p.weight], p.out_axis)
            assert mask.expand_as(structure.parameters[p.weight]).shape == structure.parameters[p.weight].shape


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("case", ["checkpointing", "bf16-mixed"])
def test_other_ways_to_train(case: str, tmp_path: Path) -> None:
    module = TinyModule("gqa_decoder")
    if case == "checkpointing":
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method = CoFiTune(modules=["ffn", "attention"], num_batches=2)
    fit(method, tmp_path, module=module, precision="32-true" if case == "checkpointing" else case)
    assert all(float(values.max()) > 0 for values in method.importance.values())
    if case == "checkpointing":
        plain = CoFiTune(modules=["ffn", "attention"], num_batches=2)
        fit(plain, tmp_path)
        for unit, values in plain.importance.items():
            torch.testing.assert_close(values, method.importance[unit], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_measuring_leaves_no_trace(model: str, tmp_path: Path) -> None:
    """The same run, bit for bit, as one that was told the importance (models have dropout and BatchNorm)."""
    measured = CoFiTune(modules=["ffn"], num_batches=3)
    module = fit(measured, tmp_path, model)
    same = fit(told(measured.importance, modules=["ffn"]), tmp_path, model)
    assert_same_weights(weights(module), weights(same))
    plain = fit(CoFiTune(modules=["ffn"], soft_mask="none"), tmp_path, model)
    differ = [n for n, v in weights(plain).items() if not torch.equal(v, weights(module)[n])]
    assert differ


# ---------------------------------------------------------------------------------------------------- masks


def one_hot(model: str, modules: list[str]) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Importance 1 of one output unit of each projection; parameter name -> its axis and index."""
    structure = find_structure(TinyModule(model))
    importance, spared = {}, {}
    units = product_of(structure, (0.25, 0.5), modules)
    for index, p in enumerate(p for p in find_projections(structure) if p.unit in units):
        size = structure.parameters[p.weight].shape[p.out_axis]
        unit = (3 * index + 1) % size
        importance[p.unit] = torch.eye(size)[unit]
        for name in p.members:
            spared[name] = (p.out_axis if structure.parameters[name].ndim > 1 else 0, unit)
    return importance, spared


class PlainSGD(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
@pytest.mark.parametrize("model", MODELS)
def test_one_hot_mask_spares_one_output_unit(model: str, soft_mask: Any, tmp_path: Path) -> None:
    """Rows of a linear layer or a kernel, columns of GPT-2's Conv1D, and nothing else, against a run without mask."""
    modules = ["ffn"] if model == "conv_net" else ["ffn", "attention"]
    importance, spared = one_hot(model, modules)
    run: dict[str, Any] = {"limit_train_batches": 1, "max_epochs": 1, "gradient_clip_val": None, "limit_val_batches": 0}
    before = weights(PlainSGD(model))
    masked = told(importance, modules=modules, soft_mask=soft_mask)
    after = weights(fit(masked, tmp_path, model, PlainSGD(model), **run))
    free = weights(fit(CoFiTune(modules=modules, soft_mask="none"), tmp_path, model, PlainSGD(model), **run))
    assert spared
    for name, (axis, unit) in spared.items():
        kept = torch.zeros_like(before[name], dtype=torch.bool)
        kept.select(axis, unit).fill_(True)
        assert torch.equal(after[name][kept], before[name][kept]), name
        assert torch.equal(after[name][~kept], free[name][~kept]), name
        if bool((free[name] != before[name]).select(axis, unit).any()):
            assert not torch.equal(free[name][kept], before[name][kept])
    rest = [name for name in before if name not in spared and "running" not in name and "num_batches" not in name]
    assert all(torch.equal(before[name], after[name]) for name in rest)
    weight = next(name for name in spared if before[name].ndim > 1)
    assert not torch.equal(free[weight], after[weight])


def test_axis_of_every_projection_on_every_architecture() -> None:
    """A unit's mask lies along the axis that the layer's own output has."""
    for name in FEED_FORWARD:
        structure = structure_of(name)
        for p in find_projections(structure):
            owner = structure.modules[p.weight.rpartition(".")[0]]
            shape = structure.parameters[p.weight].shape
            if isinstance(owner, nn.Linear):
                assert (p.out_axis, shape[0]) == (0, owner.out_features)
            elif type(owner).__name__ == "Conv1D":
                assert (p.out_axis, shape[1]) == (1, owner.nf)
            else:
                assert name == "mixtral"
                assert p.out_axis == 1
                assert shape[1] == {"up": 24, "down": 8}[p.kind]


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.filterwarnings("ignore:CoFiTune.soft_mask='gradient'")
def test_importance_zero_changes_nothing(optimizer: str, soft_mask: Any, tmp_path: Path) -> None:
    """With momentum, weight decay, accumulation and clipping on."""
    importance, _ = one_hot("gqa_decoder", ["ffn"])
    zero = {unit: torch.zeros_like(values) for unit, values in importance.items()}
    results = [
        weights(fit(method, tmp_path, module=TinyModule("gqa_decoder", optimizer)))
        for method in (
            told(zero, modules=["ffn"], soft_mask=soft_mask),
            CoFiTune(modules=["ffn"], soft_mask="none"),
        )
    ]
    assert_same_weights(*results)


def displacements(
    tmp_path: Path, make: Callable[..., Any], soft_mask: Any, importance: dict[str, Tensor], steps: int
) -> dict[str, Tensor]:
    class Other(TinyModule):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    module = Other("gqa_decoder")
    before = weights(module)
    method = told(importance, modules=["ffn"], soft_mask=soft_mask)
    fit(method, tmp_path, module=module, max_epochs=-1, max_steps=steps, gradient_clip_val=None, limit_val_batches=0)
    return {n: value - before[n] for n, value in weights(module).items() if n in method.trainable_names}


def half() -> dict[str, Tensor]:
    importance, _ = one_hot("gqa_decoder", ["ffn"])
    return {unit: torch.linspace(0, 0.9, len(values)) for unit, values in importance.items()}


def test_under_sgd_both_masks_are_the_papers(tmp_path: Path) -> None:
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
    gradient = displacements(tmp_path, make, "gradient", half(), 5)
    update = displacements(tmp_path, make, "update", half(), 5)
    free = displacements(tmp_path, make, "none", half(), 1)
    one = displacements(tmp_path, make, "gradient", half(), 1)
    for name in gradient:
        torch.testing.assert_close(gradient[name], update[name], rtol=1e-3, atol=1e-6)
        keep = 1 - torch.linspace(0, 0.9, len(one[name]))[:, None]
        torch.testing.assert_close(one[name], keep * free[name], rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:CoFiTune.soft_mask='gradient'")
def test_adam_undoes_a_mask_on_gradients_but_not_on_updates(tmp_path: Path) -> None:
    """The card's claim: a factor that is constant in time cancels in m / sqrt(v)."""
    make = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-12)  # noqa: E731
    free = displacements(tmp_path, make, "none", half(), 6)
    gradient = displacements(tmp_path, make, "gradient", half(), 6)
    update = displacements(tmp_path, make, "update", half(), 6)
    for name in free:
        size = float(free[name].norm())
        assert float((gradient[name] - free[name]).norm()) < 0.01 * size
        keep = 1 - torch.linspace(0, 0.9, len(free[name]))[:, None]
        assert float((update[name] - keep * free[name]).norm()) < 0.1 * size
        assert float((update[name] - free[name]).norm()) > 0.3 * size


def test_a_mask_that_adam_undoes_is_announced(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"next to nothing under AdamW.*soft_mask='update'"):
        fit(CoFiTune(soft_mask="gradient", num_batches=1), tmp_path, max_epochs=1)
    fit(CoFiTune(soft_mask="gradient", num_batches=1), tmp_path, module=TinyModule("gqa_decoder", "sgd"), max_epochs=1)


def test_masked_gradients_are_what_is_clipped(tmp_path: Path) -> None:
    """Once per optimizer step, at the end of an accumulation window, before clipping."""
    importance = {unit: torch.full_like(values, 0.5) for unit, values in one_hot("gqa_decoder", ["ffn"])[0].items()}
    norms: dict[str, list[float]] = {}
    for key, soft_mask in (("masked", "gradient"), ("free", "none")):
        norms[key] = []

        class Norm(pl.Callback):
            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any, key: str = key) -> None:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                norms[key].append(float(torch.stack([g.norm() for g in grads]).norm()))

        class Unclipped(TinyModule):
            def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
                grads = [p.grad for p in self.parameters() if p.grad is not None]
                norms.setdefault("at clipping", []).append(float(torch.stack([g.norm() for g in grads]).norm()))

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        method: Any = told(importance, modules=["ffn"], soft_mask=soft_mask)
        torch.manual_seed(0)
        trainer(tmp_path, [method, Norm()], max_epochs=1, limit_val_batches=0).fit(
            Unclipped("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
        )
    assert len(norms["masked"]) == 6
    assert norms["masked"] == pytest.approx([0.5 * norm for norm in norms["free"]], rel=1e-5)
    assert norms["at clipping"] == norms["masked"] + norms["free"]


class Manual(TinyModule):
    """Manual optimisation with an optimizer for each of two projections."""

    automatic_optimization = False  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        return [
            torch.optim.SGD([p for n, p in named.items() if ("up_proj" in n) == first], lr=0.1)
            for first in (True, False)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        optimizers: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("soft_mask", ["gradient", "update"])
def test_manual_optimisation_with_two_optimizers(soft_mask: Any, tmp_path: Path) -> None:
    importance, spared = one_hot("gqa_decoder", ["up", "down"])
    module = Manual()
    before = weights(module)
    method = told(importance, soft_mask=soft_mask)
    fit(method, tmp_path, module=module, accumulate_grad_batches=1, gradient_clip_val=None)
    after = weights(module)
    for name, (axis, unit) in spared.items():
        assert torch.equal(after[name].select(axis, unit), before[name].select(axis, unit))
        assert not torch.equal(after[name], before[name])
    with pytest.raises(ConfigError, match="manual optimisation"):
        fit(CoFiTune(), tmp_path, module=Manual(), accumulate_grad_batches=1, gradient_clip_val=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    importance, spared = one_hot("gqa_decoder", ["ffn"])
    module = TinyModule("gqa_decoder").to(dtype)
    before = weights(module)
    after = weights(fit(told(importance, modules=["ffn"]), tmp_path, module=module))
    for name, (axis, unit) in spared.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name].select(axis, unit), before[name].select(axis, unit))
        assert not torch.equal(after[name], before[name])


# ---------------------------------------------------------------------------------------------------- logits


class OwnLogits(TinyModule):
    """The training step uses a fused loss: no logits anywhere."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.model.model(input_ids=batch[0], use_cache=False).last_hidden_state
        return (hidden @ self.model.lm_head.weight.T).logsumexp(-1).mean()

    def batch_logits(self, batch: Any) -> Tensor:
        self.calls += 1
        return self.model(input_ids=batch[0], use_cache=False).logits


class NoLogits(OwnLogits):
    batch_logits = None  # pyright: ignore[reportAssignmentType]


def test_own_logits_are_asked(tmp_path: Path) -> None:
    module = OwnLogits("gqa_decoder")
    method = CoFiTune(num_batches=2)
    fit(method, tmp_path, module=module)
    assert max(float(values.max()) for values in method.importance.values()) > 0
    assert module.calls == 0, "a count on the module is put back with everything else"


def test_without_logits_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logits over two or more classes.*NoneType.*batch_logits\(batch\)"):
        fit(CoFiTune(num_batches=2), tmp_path, module=NoLogits("gqa_decoder"))


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_the_output(model: str) -> None:
    from lightning_peft.methods.logits import batch_logits

    module = TinyModule(model).eval()
    run = trainer(Path(), [])
    batch = dataset(model).tensors
    with torch.no_grad():
        found = batch_logits(run, module, find_structure(module), batch)
        expected = module.model(input_ids=batch[0]).logits if model != "conv_net" else module.model(batch[0])
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------- mistakes


class Dry(TinyModule):
    def on_train_start(self) -> None:
        self.eval()


def test_passes_that_do_not_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gave the same logits.*dropout=0\.0"):
        fit(CoFiTune(dropout=0.0, num_batches=2), tmp_path, module=Dry("gqa_decoder"))
    method = CoFiTune(num_batches=2)
    fit(method, tmp_path, module=Dry("gqa_decoder"))  # the default adds its own
    assert method.importance


def test_modules_that_are_not_there() -> None:
    structure = structure_of("gpt2")
    for entry, hint in (("attenton", "'attention'"), ("query", "'qkv'"), ("mlp.c_pro", "'mlp.c_proj'")):
        with pytest.raises(ScopeError, match=rf"modules='{entry}' is in no block.*{hint}"):
            CoFiTune(modules=[entry]).bind(structure, dict.fromkeys(structure.parameters, True))


def test_heads_in_an_unknown_layout() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=2
    )
    structure = find_structure(GPTNeoXForCausalLM(config))
    method = CoFiTune(modules=["attention"])
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    fused = next(p for p in find_projections(structure) if p.kind == "qkv")
    with pytest.raises(ConfigError, match=r"24 output units of .*query_key_value belong to which head"):
        method._heads_of(fused)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper", "vit", "mixtral", "gpt2"])
def test_heads_on_every_architecture(name: str) -> None:
    """Against the numbers in the models' configurations (see ``tests/core/test_blocks.py``)."""
    structure = structure_of(name)
    groups = 1 if name in ("llama", "mixtral") else 2
    found = [p for p in find_projections(structure) if p.kind in ("query", "key", "value", "qkv")]
    assert found
    for projection in found:
        heads = find_heads(structure, projection)
        assert heads is not None
        assert (heads.num_query_heads, heads.num_groups, heads.head_size) == (2, groups, 4)
        assert heads.output.unit.rpartition(".")[0].startswith(projection.unit.rpartition(".")[0].removesuffix(".self"))
        assert len(heads.spread(torch.rand(2))) == structure.parameters[projection.weight].shape[projection.out_axis]
    assert find_heads(structure, next(p for p in find_projections(structure) if p.kind == "down")) is None


def test_nothing_to_mask() -> None:
    structure = structure_of("llama")
    with pytest.raises(ConfigError, match="soft_mask='none'"):
        CoFiTune(modules=["input_layernorm"]).bind(structure, dict.fromkeys(structure.parameters, True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_range", (0.5, 0.5)),
        ("layer_range", (0.5,)),
        ("layer_range", (-0.1, 0.5)),
        ("layer_range", (0, 2)),
        ("layer_range", "bottom2"),
        ("modules", []),
        ("modules", [1]),
        ("soft_mask", "gradients"),
        ("num_batches", 0),
        ("dropout", 1),
        ("dropout", float("nan")),
    ],
)
def test_arguments_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"CoFiTune: {name}="):
        CoFiTune(**{name: value})
