"""Every method on eight architectures: it finds blocks there, and selects what it says."""

from __future__ import annotations

from functools import cache

import pytest

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import ROWS
from tests.core.test_blocks import structure_of

ARCHITECTURES = ["llama", "gpt2", "mixtral", "bert", "t5", "vit", "whisper", "mamba"]


@cache
def architecture(name: str) -> Structure:
    return structure_of(name)


# The schedules of the contract name layers of its own models; Telly there freezes two blocks, all that this ViT has.
PAIRS = [(r, a) for r in ROWS for a in ARCHITECTURES if not r.startswith("schedule") and (r, a) != ("telly", "vit")]


@pytest.mark.parametrize(("row", "name"), PAIRS)
def test_every_method_selects_on_every_architecture(row: str, name: str) -> None:
    structure = architecture(name)
    assert len(structure.blocks) >= 2
    methods: list[MethodCallback] = ROWS[row].make()
    selectable: list[frozenset[str]] = []
    for method in methods:
        claim = method.bind(structure, dict.fromkeys(structure.parameters, True))
        assert claim.selectable <= method.selectable <= frozenset(structure.parameters)
        selectable.append(method.selectable)
        if method.needs_batch or row == "lisa_outliers":
            continue  # what it selects depends on data: its own tests look at that
        for index in range(3):
            chosen = method._select(Draw(index, index, index, method.seed))
            names = method._names(chosen)
            assert chosen
            assert names <= method.selectable
            assert chosen == method._select(Draw(index, index, index, method.seed)), "a draw is a pure function"
    assert sum(map(len, selectable)) == len(frozenset().union(*selectable)), "methods of a row are disjoint"
