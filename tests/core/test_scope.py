"""What a scope selects, against brute force over all names with ``fnmatch``, ``re`` and plain prefixes."""

from __future__ import annotations

import fnmatch
import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft.core.blocks import ROLES, Structure, find_structure
from lightning_peft.core.scope import Scope, resolve_scope
from lightning_peft.errors import ScopeError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = Attention()
        self.mlp = nn.Linear(4, 4)


class Decoder(nn.Module):
    """Twelve layers, so that ``layers.1`` is a prefix of ``layers.10``; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Layer() for _ in range(12)])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@functools.cache
def structure() -> Structure:
    return find_structure(Decoder())


@functools.cache
def every_name() -> tuple[tuple[str, str], ...]:
    """``(name, canonical name)`` of each parameter, straight from torch."""
    model = Decoder()
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return tuple((name, first.setdefault(id(parameter), name)) for name, parameter in named)


def names(scope: str | list[str]) -> tuple[str, ...]:
    return resolve_scope(scope, structure()).names


# ---------------------------------------------------------------------------------------------------- each kind


@pytest.mark.parametrize("role", [role for role in ROLES if role != "adapters"])
def test_roles(role: str) -> None:
    found = resolve_scope(role, structure())
    assert found.names == structure().roles[role] != ()
    assert found.explicit == frozenset()


def test_roles_by_hand() -> None:
    assert names("embeddings") == names("head") == ("embed_tokens.weight",)
    assert names("norms") == (*(f"layers.{i}.norm.{leaf}" for i in range(12) for leaf in ("weight", "bias")), *NORM)
    assert names("biases") == (
        *(f"layers.{i}.{part}.bias" for i in range(12) for part in ("norm", "attn.q_proj", "mlp")),
        "norm.bias",
    )
    assert names("blocks") == tuple(n for n, _ in every_name() if n.startswith("layers."))
    assert names("all") == tuple(dict.fromkeys(canonical for _, canonical in every_name()))


NORM = ("norm.weight", "norm.bias")


def test_paths_end_at_dots() -> None:
    assert names("norm") == NORM
    assert len(names("layers.1")) == 7
    assert all(name.startswith("layers.1.") for name in names("layers.1"))
    assert names("layers.1.attn") == names(["layers.1.attn.q_proj", "layers.1.attn.k_proj"])
    assert names("layers.3.mlp.bias") == ("layers.3.mlp.bias",)


def test_globs() -> None:
    assert names("*.q_proj.*") == tuple(
        f"layers.{i}.attn.q_proj.{leaf}" for i in range(12) for leaf in ("weight", "bias")
    )
    assert names("*.q_proj") == names("*.q_proj.*")  # a glob of module paths stands for everything below
    assert names("layers.[13].mlp.weight") == ("layers.1.mlp.weight", "layers.3.mlp.weight")
    assert names("layers.?.mlp.weight") == tuple(f"layers.{i}.mlp.weight" for i in range(10))
    assert names("layers.1?") == names(["layers.10", "layers.11"])


def test_regular_expressions_match_whole_names() -> None:
    assert names(r"re:layers\.1\..*") == names("layers.1")
    assert names(r"re:layers\.(0|11)\.mlp\.bias") == ("layers.0.mlp.bias", "layers.11.mlp.bias")
    for part in ("mlp", r"layers\.1", r"layers\.1\.mlp"):
        with pytest.raises(ScopeError, match="matches no parameter"):
            names(f"re:{part}")
    with pytest.raises(ScopeError, match=r"'re:\(' is not a valid regular expression"):
        names("re:(")


def test_classes() -> None:
    assert names("class:LayerNorm") == names("norms")
    assert names("class:Attention") == names("*.attn.*")
    assert names("class:Embedding") == ("embed_tokens.weight",)
    assert names("class:Decoder") == names("all")


def test_negation_follows_the_order_of_entries() -> None:
    assert names(["blocks", "!norms", "!biases"]) == tuple(
        f"layers.{i}.{part}.weight" for i in range(12) for part in ("attn.q_proj", "attn.k_proj", "mlp")
    )
    assert names(["layers.0", "!layers.0.attn", "layers.0.attn.k_proj"]) == (
        "layers.0.norm.weight",
        "layers.0.norm.bias",
        "layers.0.attn.k_proj.weight",
        "layers.0.mlp.weight",
        "layers.0.mlp.bias",
    )
    assert "layers.2.norm.weight" not in names(["blocks", "!class:LayerNorm"])


def test_order_is_the_models() -> None:
    assert names(["layers.5", "layers.2"]) == names(["layers.2", "layers.5"])
    assert names(["norm", "blocks", "norm"]) == (*structure().roles["blocks"], *NORM)


def test_nothing_is_asked_for() -> None:
    assert resolve_scope([], structure()) == Scope((), frozenset())
    assert names(["!norms"]) == ()


# ---------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.parametrize("entry", ["lm_head.weight", "lm_head", "lm_*", "re:lm_head.*", "head", "embed_tokens"])
def test_every_name_of_a_tied_weight_selects_it(entry: str) -> None:
    found = resolve_scope(entry, structure())
    assert found.names == ("embed_tokens.weight",)
    assert found.explicit == (frozenset() if entry == "head" else {"embed_tokens.weight"})
    assert "embed_tokens.weight" not in names(["all", f"!{entry}"])


def test_class_of_the_second_holder_of_a_tied_weight() -> None:
    assert "embed_tokens.weight" in names("class:Linear")


def test_explicit_is_what_was_named() -> None:
    found = resolve_scope(["blocks", "layers.0.mlp.weight", "*.k_proj.*", "!layers.3"], structure())
    assert found.explicit == {
        "layers.0.mlp.weight",
        *(f"layers.{i}.attn.k_proj.weight" for i in range(12) if i != 3),
    }
    # Also in the other order: naming it once is enough.
    assert resolve_scope(["layers.0.mlp.weight", "blocks"], structure()).explicit == {"layers.0.mlp.weight"}


# ---------------------------------------------------------------------------------------------------- quantised weights


def quantised() -> Structure:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}) for _ in range(2)])
    for layer in model.layers:
        packed = torch.zeros(2, 1, dtype=torch.uint8)
        layer["fc"].weight = nn.Parameter(packed, requires_grad=False)  # pyright: ignore[reportIndexIssue]
    return find_structure(model)


def test_integer_tensors_are_left_out() -> None:
    found = resolve_scope("blocks", quantised()).names
    assert found == tuple(f"layers.{i}.{leaf}" for i in range(2) for leaf in ("fc.bias", "norm.weight", "norm.bias"))
    assert resolve_scope("layers.0", quantised()).names == found[:3]
    assert resolve_scope("*fc*", quantised()).names == ("layers.0.fc.bias", "layers.1.fc.bias")


@pytest.mark.parametrize("scope", ["layers.0.fc.weight", "*fc.weight", "re:.*fc.weight"])
def test_integer_tensors_alone_are_refused(scope: str) -> None:
    with pytest.raises(ScopeError, match=r"only integer tensors such as 'layers.0.fc.weight' \(torch.uint8\).*adapter"):
        resolve_scope(scope, quantised())


def test_complex_weights_are_trainable() -> None:
    model = nn.ParameterDict({"phase": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    assert resolve_scope("phase", find_structure(model)).names == ("phase",)


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("scope", "nearest"),
    [
        ("block", "'blocks'"),
        ("Norms", "'norms'"),
        ("embedings", "'embeddings'"),
        ("layers.12", "'layers.1[0-9]?'"),
        ("layer.3.mlp.weight", "'layers.3.mlp.weight'"),
        ("lm_hed.weight", "'lm_head.weight'"),
        (["blocks", "!nroms"], "'norms'"),
        ("class:Layernorm", "'LayerNorm'"),
    ],
)
def test_mistakes_name_the_nearest(scope: str | list[str], nearest: str) -> None:
    with pytest.raises(ScopeError, match=nearest) as error:
        resolve_scope(scope, structure(), argument="always")
    assert "always=" in str(error.value)
    assert isinstance(error.value, ValueError)


def test_a_role_the_model_has_not() -> None:
    with pytest.raises(ScopeError, match=r"scope='adapters' matches no parameter.*'blocks', 'embeddings', 'head'"):
        names("adapters")
    assert names(["blocks", "!adapters"]) == names("blocks")


def test_a_scope_that_takes_everything_away() -> None:
    with pytest.raises(ScopeError, match=r"layers.3, !layers"):
        names(["layers.3", "!layers"])


# ---------------------------------------------------------------------------------------------------- algebra


def brute_force(entry: str) -> set[str]:
    """Canonical names of an entry, each kind written out over all names."""
    if entry in ROLES:
        return set(structure().roles[entry])
    if entry.startswith("re:"):
        return {canonical for name, canonical in every_name() if re.fullmatch(entry[3:], name)}
    if any(character in entry for character in "*?["):
        return {canonical for name, canonical in every_name() if fnmatch.fnmatchcase(name, entry)}
    parts = entry.split(".")
    return {canonical for name, canonical in every_name() if name.split(".")[: len(parts)] == parts}


ENTRIES = [
    *(role for role in ROLES if role != "adapters"),
    *(name for name, _ in every_name()),
    *(f"layers.{i}" for i in range(12)),
    *(f"layers.{i}.attn" for i in range(0, 12, 3)),
    *("lm_head", "norm", "layers", "embed_tokens"),
    *("*.weight", "*.bias", "layers.1*.mlp.*", "*q_proj*", "*norm*", "layers.[!02468].*", "?m_head.weight"),
    *(r"re:.*\.weight", r"re:layers\.\d\..*", r"re:(lm_head|norm)\..*", r"re:layers\.(2|3|11)\.mlp\.(weight|bias)"),
]


@settings(max_examples=300, deadline=None)
@given(entries=st.lists(st.tuples(st.booleans(), st.sampled_from(ENTRIES)), min_size=1, max_size=5))
def test_any_list_of_entries(entries: list[tuple[bool, str]]) -> None:
    expected: set[str] = set()
    explicit: set[str] = set()
    for negative, entry in entries:
        matched = brute_force(entry)
        assert matched, entry
        if negative:
            expected -= matched
            explicit -= matched
        else:
            expected |= matched
            explicit |= set() if entry in ROLES else matched
    scope = [f"!{entry}" if negative else entry for negative, entry in entries]
    if not expected and any(not negative for negative, _ in entries):
        with pytest.raises(ScopeError):
            resolve_scope(scope, structure())
        return
    found = resolve_scope(scope, structure())
    assert set(found.names) == expected
    assert found.explicit == explicit
    assert list(found.names) == [name for name in structure().parameters if name in expected]
