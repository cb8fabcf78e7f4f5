"""``lightning-peft methods``: every registered method with its card, read from its class docstring."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

import lightning_peft
from lightning_peft.errors import suggest
from lightning_peft.methods.base import MethodCallback
from lightning_peft.report.console import render

__all__ = ["MethodCard", "method_card", "method_classes", "print_methods"]

_METHOD_PACKAGES = ("lightning_peft.methods.", "lightning_peft.adapters.", "lightning_peft.optim.")
_SECTION = re.compile(r"^([A-Z][A-Za-z' ]+):$")


@dataclass(frozen=True)
class MethodCard:
    """A method's docstring, cut into what a table shows.

    Args:
        name: Public name.
        summary: First sentence.
        about: The paragraphs before the first section: first what it does to training, memory and speed; one of the
            others starts with "Use it" and says what for.
        sections: Section title -> text, such as ``"Paper"`` or ``"Args"``.
        signature: The constructor with its defaults.
        docstring: The whole docstring, with normal indentation.
    """

    name: str
    summary: str
    about: str
    sections: dict[str, str]
    signature: str
    docstring: str


def method_classes() -> dict[str, type[MethodCallback]]:
    """Return the public method callbacks by name, in the order of the package's list of public names."""
    found = {}
    for name, module in lightning_peft._PUBLIC.items():
        if module.startswith(_METHOD_PACKAGES):
            value = getattr(lightning_peft, name)
            if inspect.isclass(value) and issubclass(value, MethodCallback):
                found[name] = value
    return found


def method_card(name: str, method: type) -> MethodCard:
    """Read the card of ``method`` from its docstring."""
    docstring = inspect.getdoc(method) or ""
    summary, _, rest = docstring.partition("\n\n")
    sections: dict[str, list[str]] = {}
    about: list[str] = []
    lines = about
    for line in rest.splitlines():
        match = _SECTION.match(line)
        if match:
            lines = sections.setdefault(match[1], [])
        else:
            lines.append(line.strip())
    return MethodCard(
        name=name,
        summary=_one_line(summary),
        about="\n".join(about).strip(),
        sections={title: "\n".join(text).strip() for title, text in sections.items()},
        signature=f"{name}{inspect.signature(method)}",
        docstring=docstring,
    )


def print_methods(args: list[str]) -> int:
    """Print all methods as a table, or those named in ``args`` whole.

    Args:
        args: Names of methods; none for the table.

    Returns:
        The exit code: 0, or 2 if a name is unknown.
    """
    if any(arg in ("-h", "--help") for arg in args):
        print(
            "usage: lightning-peft methods [NAME ...]\n\nLists the fine-tuning methods; with names, shows these whole."
        )
        return 0
    methods = method_classes()
    lowered = {name.lower(): name for name in methods}
    unknown = [arg for arg in args if arg.lower() not in lowered]
    if unknown:
        for arg in unknown:
            print(f"error: {arg!r} is not a method.\n  {suggest(arg, methods)}", file=sys.stderr)
        return 2
    if args:
        for arg in args:
            card = method_card(lowered[arg.lower()], methods[lowered[arg.lower()]])
            print(f"{card.signature}\n\n{card.docstring}\n")
        return 0
    table = Table(box=box.SIMPLE_HEAD, show_lines=False, padding=(0, 1, 1, 0))
    table.add_column("method", no_wrap=True, style="bold")
    table.add_column("what it trains, and what that costs", ratio=3)
    table.add_column("paper", ratio=2)
    for name, method in methods.items():
        card = method_card(name, method)
        paragraphs = [_one_line(paragraph) for paragraph in card.about.split("\n\n")]
        cost, use = paragraphs[0], [text for text in paragraphs[1:] if text.startswith("Use it ")]
        text = "\n".join([f"[bold]{escape(card.summary)}[/bold]", *(escape(text) for text in (cost, *use) if text)])
        table.add_row(name, text, escape(_one_line(card.sections.get("Paper", ""))))
    print(render(table))
    print("`lightning-peft methods NAME` shows one whole.")
    return 0


def _one_line(text: str) -> str:
    """Join wrapped lines and drop reStructuredText's literal marks."""
    return " ".join(text.split()).replace("``", "`")
