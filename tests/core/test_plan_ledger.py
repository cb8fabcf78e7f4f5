"""Claims of several methods, and the record of who trained when against brute force."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_peft.core.ledger import Ledger
from lightning_peft.core.plan import Claim, check_disjoint, fingerprint_names
from lightning_peft.errors import PlanConflict

UNITS = {"embed": ("e.weight",), "block.0": ("0.w", "0.b"), "block.1": ("1.w", "1.b"), "block.2": ("2.w",)}

rows = st.lists(st.tuples(st.integers(1, 5), st.frozensets(st.sampled_from(list(UNITS)))), min_size=1, max_size=8).map(
    lambda gaps: [(sum(gap for gap, _ in gaps[:i]), active) for i, (_, active) in enumerate(gaps)]
)


# ---------------------------------------------------------------------------------------------------- plan


def test_disjoint_claims_pass() -> None:
    check_disjoint([])
    check_disjoint([Claim("LISA", frozenset("ab")), Claim("HFT", frozenset("cd")), Claim("none", frozenset())])


def test_conflict_names_both_methods_and_the_parameters() -> None:
    claims = [
        Claim("LISA(scope='blocks')", frozenset({"a", "b", "c", "d", "e"})),
        Claim("HFT(scope='encoder')", frozenset({"b", "c", "d", "e", "f"})),
        Claim("BitFit()", frozenset({"z"})),
    ]
    with pytest.raises(PlanConflict) as error:
        check_disjoint(claims)
    message = str(error.value)
    assert "LISA(scope='blocks') and HFT(scope='encoder') both claim b, c, d and 1 more" in message
    assert "BitFit" not in message
    assert "scope=" in message
    assert isinstance(error.value, ValueError)


def test_all_conflicts_are_reported_together() -> None:
    with pytest.raises(PlanConflict, match=r"A and B both claim x; A and C both claim y"):
        check_disjoint([Claim("A", frozenset("xy")), Claim("B", frozenset("x")), Claim("C", frozenset("y"))])


@settings(max_examples=100, deadline=None)
@given(st.frozensets(st.text("ab.\n", max_size=4), max_size=4), st.frozensets(st.text("ab.\n", max_size=4), max_size=4))
def test_fingerprints_of_plans_differ_as_the_plans_do(left: frozenset[str], right: frozenset[str]) -> None:
    # Names come without line breaks from torch.
    a, b = ({name.replace("\n", "") for name in names} - {""} for names in (left, right))
    assert (fingerprint_names(a) == fingerprint_names(b)) == (a == b)
    assert fingerprint_names(sorted(a)) == fingerprint_names(sorted(a, reverse=True))
    assert 0 <= fingerprint_names(a) < 2**62


# ---------------------------------------------------------------------------------------------------- ledger


@settings(max_examples=150, deadline=None)
@given(history=rows, until=st.integers(0, 50))
def test_ledger_against_brute_force(history: list[tuple[int, frozenset[str]]], until: int) -> None:
    ledger = Ledger(UNITS)
    for step, active in history:
        ledger.record(step, active)
    assert len(ledger) == len(history)
    assert ledger.rows() == history
    assert ledger.history() == [(step, frozenset(n for u in active for n in UNITS[u])) for step, active in history]
    # Step by step: who is active is said by the last row at or before the step.
    expected = dict.fromkeys(UNITS, 0)
    for step in range(until):
        for unit in [active for start, active in history if start <= step][-1]:
            expected[unit] += 1
    assert ledger.steps_trained(until) == expected


@settings(max_examples=50, deadline=None)
@given(history=rows)
def test_ledger_survives_a_checkpoint(history: list[tuple[int, frozenset[str]]]) -> None:
    ledger = Ledger(UNITS)
    for step, active in history:
        ledger.record(step, active)
    state = json.loads(json.dumps(ledger.state_dict()))  # plain values only
    again = Ledger(UNITS)
    again.record(99, ["embed"])
    again.load_state_dict(state)
    assert again.rows() == ledger.rows()
    assert again.history() == ledger.history()
    again.record(1000, ["block.1"])
    assert again.rows()[-1] == (1000, frozenset({"block.1"}))
    assert len(ledger) == len(history)


def test_ledger_is_small() -> None:
    """A draw costs as many small integers as units are active, however many parameters a unit has."""
    units = {f"model.layers.{i}": tuple(f"model.layers.{i}.{j}.weight" for j in range(50)) for i in range(80)}
    ledger = Ledger(units)
    for draw in range(500):
        ledger.record(20 * draw, [f"model.layers.{(draw + k) % 80}" for k in range(2)])
    size = len(json.dumps(ledger.state_dict()["rows"]))
    assert size < 500 * 25
    assert sum(len(names) for _, names in ledger.history()) == 500 * 100


def test_ledger_of_other_units_is_refused() -> None:
    state = Ledger({"a": ("x",)}).state_dict()
    with pytest.raises(ValueError, match="other units"):
        Ledger({"b": ("x",)}).load_state_dict(state)
