"""What searches choose from: units, levels of the tree, and scope entries that stand for exactly some names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.scope import resolve_scope
from lightning_peft.methods.projections import product_of
from lightning_peft.search import LAYER_RANGES, block_modules, coarse_levels
from lightning_peft.search.space import compact_names
from tests.core.test_blocks import structure_of
from tests.methods.test_architectures import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_are_disjoint_parts_of_blocks(name: str) -> None:
    structure = structure_of(name)
    units = block_modules(structure)
    names = [n for members in units.values() for n in members]
    assert len(names) == len(set(names))
    per_block = 1 if name == "mamba" else 2
    assert len(units) == per_block * len(structure.blocks)
    for label, members in units.items():
        block = label.split()[0]
        assert members
        assert all(n.startswith(f"{block}.") for n in members)
    norms = set(structure.roles["norms"])
    assert not norms & set(names)


def test_blocks_without_attention_and_feed_forward_are_whole_units() -> None:
    structure = find_structure(nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(3)]))
    units = block_modules(structure, groups=("attention",))
    assert [len(members) for members in units.values()] == [4, 4, 4]


def labels(name: str) -> list[list[str]]:
    """Labels of each level along feed-forward."""
    levels = coarse_levels(structure_of(name))
    first = levels[0]({})
    chosen = first["bottom2"]
    second = levels[1](chosen)
    third = levels[2]({**chosen, **second["ffn"]})
    return [list(first), list(second), list(third)]


def test_levels_of_the_tree() -> None:
    ranges, groups, parts = labels("llama")
    assert ranges == list(LAYER_RANGES)
    assert groups == ["attention", "ffn"]
    assert parts == ["up+down", "up", "down"]
    levels = coarse_levels(structure_of("llama"))
    chosen = {"layer_range": (0.25, 0.5), "modules": ("attention",)}
    assert list(levels[2](chosen)) == ["query+key+value", "output"]
    assert levels[2]({**chosen, "modules": ("attention", "ffn")}) == {}


def test_branches_that_a_model_does_not_have_are_left_out() -> None:
    assert labels("mamba")[1:] == [["ffn"], ["up+down", "up", "down"]]
    fused = {"layer_range": (0.25, 0.5), "modules": ("attention",)}
    assert list(coarse_levels(structure_of("gpt2"))[2](fused)) == ["qkv", "output"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_branch_trains_something(name: str) -> None:
    structure = structure_of(name)
    levels = coarse_levels(structure)
    count = 0
    for first in levels[0]({}).values():
        for second in levels[1](first).values():
            for third in levels[2]({**first, **second}).values():
                chosen = {**first, **second, **third}
                assert product_of(structure, chosen["layer_range"], chosen["modules"])
                count += 1
    assert count >= 7 * 2


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(["llama", "gpt2", "t5", "mixtral"]))
def test_compact_entries_stand_for_exactly_the_names(data: st.DataObject, name: str) -> None:
    structure = structure_of(name)
    every = list(structure.parameters)
    first = data.draw(st.integers(0, len(every) - 1))
    last = data.draw(st.integers(first + 1, len(every)))
    dropped = data.draw(st.sets(st.sampled_from(every), max_size=3))
    names = set(every[first:last]) - dropped
    if not names:
        return
    entries = compact_names(structure, names)
    assert set(resolve_scope(entries, structure).names) == names
    assert len(entries) <= len(names)


def test_compact_entries_are_whole_modules() -> None:
    structure = structure_of("llama")
    block = structure.blocks[1]
    assert compact_names(structure, block.parameters) == [block.name]
    assert compact_names(structure, [n for n in block.parameters if ".mlp." in n]) == [f"{block.name}.mlp"]


def test_a_module_that_is_called_like_a_role_is_not_taken_for_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
            self.head = nn.Linear(2, 2)
            self.head.weight.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    structure = find_structure(Net())
    entries = compact_names(structure, structure.roles["head"])
    assert entries == ["head.weight", "head.bias"]
    assert resolve_scope(entries, structure).explicit == {"head.weight", "head.bias"}
