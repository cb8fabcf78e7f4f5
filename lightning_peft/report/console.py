"""Printing for reports: rich renderables that do not tear a progress bar."""

from __future__ import annotations

import io
import sys

from rich.console import Console, RenderableType
from tqdm.auto import tqdm

__all__ = ["format_bytes", "format_count", "render", "show"]

_PLAIN_WIDTH = 110


def render(renderable: RenderableType) -> str:
    """Return ``renderable`` as text: coloured for a terminal, plain and up to 110 characters wide for a file."""
    terminal = Console(file=sys.stdout)
    buffer = io.StringIO()
    width = terminal.width if terminal.is_terminal else _PLAIN_WIDTH
    Console(
        file=buffer,
        width=width,
        force_terminal=terminal.is_terminal,
        color_system="auto" if terminal.is_terminal else None,
        legacy_windows=False,
    ).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").splitlines())


def show(renderable: RenderableType) -> None:
    """Print ``renderable`` to standard output, above a progress bar if one is running; a string goes out unwrapped."""
    tqdm.write(renderable if isinstance(renderable, str) else render(renderable), file=sys.stdout)


def format_count(number: int) -> str:
    """Return a count with three or four digits, such as ``"22.71 M"``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)


def format_bytes(number: int) -> str:
    """Return a size in binary units, such as ``"86.6 MiB"``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"
