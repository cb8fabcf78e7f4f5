"""Where records come from: text files, JSONL and CSV files, and Hugging Face ``datasets``.

Every record knows its place (file and line, or data set and row), so that a mistake in the data can be found.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError, suggest

__all__ = ["Record", "find_files", "read_hub", "read_records", "read_texts"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


@dataclass(frozen=True)
class Record:
    """Named values and where they were read.

    Args:
        values: Value of each column.
        place: For people: ``"chats.jsonl:3"``.
    """

    values: dict[str, Any]
    place: str

    def __getitem__(self, column: str) -> Any:
        """Return the value of a column; a missing one is a ConfigError with the nearest names."""
        if self.values.get(column) is None:
            if column in self.values:
                raise ConfigError(f"{self.place}: column {column!r} is empty")
            raise ConfigError(f"{self.place}: no column {column!r}. {suggest(column, map(str, self.values))}")
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column that must hold text."""
        value = self[column]
        if not isinstance(value, str):
            raise ConfigError(f"{self.place}: column {column!r} holds {type(value).__name__}, text is needed")
        return value


def find_files(path: str | Sequence[str], suffixes: Sequence[str], argument: str = "path") -> list[Path]:
    """Return the files that a file, folder or glob names, sorted, each once.

    Args:
        path: One or several of: a file; a folder (its files with one of ``suffixes``, however deep); a glob, in which
            ``**`` stands for any number of folders.
        suffixes: Of the files to take from a folder, such as ``(".csv",)``.
        argument: Name of the setting, for the error.

    Raises:
        ConfigError: If a path is missing or gives no file, with the nearest that exists.
    """
    files: list[Path] = []
    for name in [path] if isinstance(path, str | os.PathLike) else path:
        one = Path(name).expanduser()
        if one.is_file():
            found = [one]
        elif one.is_dir():
            found = [file for file in one.rglob("*") if file.is_file() and file.suffix.lower() in suffixes]
            if not found:
                raise ConfigError(
                    f"{argument}: folder {str(name)!r} has no file that ends in {', '.join(suffixes)}. "
                    f"{suggest('', _names(one))} Give a glob for other endings, such as {str(one / '*.log')!r}."
                )
        elif glob.has_magic(str(one)):
            found = [Path(file) for file in glob.glob(str(one), recursive=True) if os.path.isfile(file)]
            if not found:
                before_magic = re.split(r"[*?[]", str(one), maxsplit=1)[0]
                fixed = Path(os.path.dirname(before_magic))
                raise ConfigError(f"{argument}: no file matches {str(name)!r}. {_nearest_file(fixed / one.name)}")
        else:
            raise ConfigError(f"{argument}: {str(name)!r} does not exist. {_nearest_file(one)}")
        files += sorted(found)
    return list(dict.fromkeys(files))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _nearest_file(path: Path) -> str:
    """Say which names in the deepest existing folder of a missing path come near it."""
    missing, folder = path.name, path.parent
    while not folder.is_dir() and folder != folder.parent:
        missing, folder = folder.name, folder.parent
    names = _names(folder) if folder.is_dir() else []
    return f"In {str(folder)!r}: {suggest(missing, names) or 'nothing.'}"


def read_texts(files: Iterable[Path]) -> Iterator[Record]:
    """Yield the text of each file as column ``text``; bytes that are no UTF-8 become U+FFFD."""
    for file in files:
        yield Record({"text": file.read_text(encoding="utf-8", errors="replace")}, str(file))


def read_records(files: Iterable[Path]) -> Iterator[Record]:
    """Yield the records of JSONL (one object a line), JSON (a list of objects), CSV and TSV (with a header) files.

    Raises:
        ConfigError: If a file is not what its ending says, with the line.
    """
    for file in files:
        ending = file.suffix.lower()
        if ending in (".jsonl", ".ndjson"):
            yield from _read_jsonl(file)
        elif ending == ".json":
            yield from _read_json(file)
        elif ending in (".csv", ".tsv"):
            yield from _read_table(file, "\t" if ending == ".tsv" else ",")
        else:
            raise ConfigError(f"{file}: records are read from files that end in {', '.join(RECORD_SUFFIXES)}")


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{file}:{number}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{place}: no JSON: {error.msg} at column {error.colno}") from error
                yield _record(value, place)


def _read_json(file: Path) -> Iterator[Record]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file}:{error.lineno}: no JSON: {error.msg}. One object a line is JSONL: name the file *.jsonl"
        ) from error
    if not isinstance(values, list):
        raise ConfigError(f"{file}: a list of objects is needed, found {type(values).__name__}")
    for index, value in enumerate(values):
        yield _record(value, f"{file}[{index}]")


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: an object with named values is needed, found {type(value).__name__}")
    return Record(value, place)


def _read_table(file: Path, delimiter: str) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{file}:{reader.line_num}"
                if None in row:
                    raise ConfigError(f"{place}: more values than the header has columns; quote values with commas")
                yield Record(dict(row), place)
        except csv.Error as error:
            raise ConfigError(f"{file}:{reader.line_num}: {error}") from error


def read_hub(dataset: str, config: str | None, split: str) -> Iterator[Record]:
    """Yield the rows of one split of a Hugging Face data set.

    Args:
        dataset: Name on the hub, folder that ``datasets`` can load, or folder written by ``save_to_disk``.
        config: Name of the configuration, for data sets that have several.
        split: Such as ``train`` or ``train[:10%]``.

    Raises:
        ConfigError: If ``datasets`` is not installed, or the data set or split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset={dataset!r} needs the package 'datasets': pip install 'lightning_peft[data]'"
        ) from error
    saved = Path(dataset)
    try:
        if (saved / "dataset_dict.json").is_file() or (saved / "dataset_info.json").is_file():
            loaded: Any = datasets.load_from_disk(dataset)
            if not isinstance(loaded, dict):
                loaded = {"train": loaded}
            if split not in loaded:
                raise ConfigError(f"dataset {dataset!r} has no split {split!r}. {suggest(split, map(str, loaded))}")
            rows = loaded[split]
        else:
            rows = datasets.load_dataset(dataset, config, split=split)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"dataset {dataset!r} (config {config!r}, split {split!r}) could not be loaded: {error}"
        ) from error
    for index, row in enumerate(rows):
        yield Record(dict(row), f"dataset {dataset!r}, split {split!r}, row {index}")
