"""What a method's card must say: what it does, what it costs, when to use it, whose it is, how it differs."""

from __future__ import annotations

import inspect
import re

import pytest

from lightning_peft.cli.methods import method_card, method_classes

METHODS = {n: cls for n, cls in method_classes().items() if cls.__module__.startswith("lightning_peft.methods.")}
COST = re.compile(r"FLOPs|memory|bytes|optimizer state|forward pass|costs?\b", re.IGNORECASE)


@pytest.mark.parametrize("name", METHODS)
def test_card_is_whole(name: str) -> None:
    card = method_card(name, METHODS[name])
    assert card.summary
    assert re.search(r"\bUse (it|this)\b", card.about), "when to use it"
    assert COST.search(card.about), "what it costs"
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:|ACL|EMNLP", card.sections["Paper"])
    assert len(card.sections["Differs from the paper"].split()) >= 8
    assert ">>> " in card.sections["Example"]


@pytest.mark.parametrize("name", METHODS)
def test_card_names_every_argument_and_no_other(name: str) -> None:
    card = method_card(name, METHODS[name])
    documented = set(re.findall(r"^(\w+): ", card.sections["Args"], flags=re.MULTILINE))
    parameters = set(inspect.signature(METHODS[name]).parameters)
    assert parameters <= documented
    # Continuation lines may begin with a word and a colon; every word that is no argument must be one of those.
    assert len(documented - parameters) <= 2, documented - parameters
