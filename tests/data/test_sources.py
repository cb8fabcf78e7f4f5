from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.data.sources import find_files, read_hub, read_records
from lightning_peft.errors import ConfigError

SUFFIXES = (".jsonl", ".csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.csv", "deep/er/d.jsonl", "deep/notes.log"):
        (tmp_path / name).write_text("")
    return tmp_path


def found(folder: Path, path: Any) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files(path, SUFFIXES)]


def test_a_path_is_a_file_a_folder_a_glob_or_several(folder: Path) -> None:
    assert found(folder, str(folder / "b.jsonl")) == ["b.jsonl"]
    assert found(folder, str(folder)) == ["a.jsonl", "b.jsonl", "deep/c.csv", "deep/er/d.jsonl"]
    assert found(folder, str(folder / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert found(folder, str(folder / "**" / "*.jsonl")) == ["a.jsonl", "b.jsonl", "deep/er/d.jsonl"]
    assert found(folder, [str(folder / "deep"), str(folder / "a.jsonl"), str(folder / "deep" / "c.csv")]) == [
        "deep/c.csv",
        "deep/er/d.jsonl",
        "a.jsonl",
    ]
    assert found(folder, str(folder / "deep" / "notes.log")) == ["deep/notes.log"]


def test_a_missing_path_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_path: '.*/c\.jsonl' does not exist.*Did you mean '[ab]\.jsonl'"):
        find_files(str(folder / "c.jsonl"), SUFFIXES, "train_path")
    with pytest.raises(ConfigError, match=r"does not exist.*Did you mean 'deep'"):
        find_files(str(folder / "depe" / "er" / "d.jsonl"), SUFFIXES)
    with pytest.raises(ConfigError, match=r"no file matches '.*/\*\.tsv'.*a\.jsonl"):
        find_files(str(folder / "*.tsv"), SUFFIXES)
    with pytest.raises(ConfigError, match=r"folder '.*/deep' has no file that ends in \.md.*'notes\.log'"):
        find_files(str(folder / "deep"), (".md",))


def values(file: Path) -> list[dict[str, Any]]:
    return [record.values for record in read_records([file])]


def test_record_files(tmp_path: Path) -> None:
    rows = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "ü", "label": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"a, ""b""\nc",x\nü,y\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a, ""b""\nc"\tx\nü\ty\n', encoding="utf-8")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        assert values(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: no JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: an object with named values is needed, found list"),
        ("a.json", '{"a": 1}', r"a list of objects is needed, found dict"),
        ("a.json", '{"a": 1}\n{"a": 1}', r"One object a line is JSONL"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: more values than the header"),
        ("a.parquet", "", r"records are read from files that end in \.jsonl"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        values(tmp_path / name)


def test_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nhello\n")
    (record,) = read_records([tmp_path / "a.csv"])
    assert record.text("text") == "hello"
    with pytest.raises(ConfigError, match=r"a\.csv:2: no column 'txt'\. Did you mean 'text'"):
        record["txt"]
    with pytest.raises(ConfigError, match=r"a\.csv:2: column 'label' is empty"):
        record["label"]
    (tmp_path / "a.jsonl").write_text('{"text": 3}')
    (record,) = read_records([tmp_path / "a.jsonl"])
    with pytest.raises(ConfigError, match="column 'text' holds int, text is needed"):
        record.text("text")


def test_hugging_face_data_set_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert [record["text"] for record in read_hub(str(tmp_path / "one"), None, "train")] == ["a", "b"]
    assert [record["text"] for record in read_hub(str(tmp_path / "several"), None, "test")] == ["b"]
    with pytest.raises(ConfigError, match=r"no split 'tset'\. Did you mean 'test'"):
        list(read_hub(str(tmp_path / "several"), None, "tset"))


def test_hugging_face_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [record["text"] for record in read_hub(str(tmp_path / "data"), None, "train[1:]")] == ["b"]
    with pytest.raises(ConfigError, match=r"split 'nothing'\) could not be loaded"):
        list(read_hub(str(tmp_path / "data"), None, "nothing"))
    with pytest.raises(ConfigError, match="could not be loaded"):
        list(read_hub(str(tmp_path / "missing"), None, "train"))


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package 'datasets': pip install 'lightning_peft\[data\]'"):
        list(read_hub("imdb", None, "train"))
