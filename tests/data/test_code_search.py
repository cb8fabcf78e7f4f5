from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_peft import PythonCodeSearch
from lightning_peft.data.code_search import (
    Corpus,
    build_corpus,
    functions_of,
    names_of,
    source_files,
    unique_pairs,
)
from lightning_peft.errors import ConfigError

SOURCE = '''"""What the module is for. More of it."""
import os


class ThreadPool(object):
    """Runs work in threads.

    At length."""

    @property
    def size(self):
        """Number of threads
        that are alive.

        A note."""
        # counted anew
        return len(self.threads)

    async def stop(self): "On one line."; return None

    def later(self):
        """Nothing to see."""
        raise NotImplementedError

    def only(self):
        """Only a docstring."""


def outer(x):
    def inner():
        """Found inside."""

        if x:
            return 1
        return 2
    try:
        def guarded():
            """Found in a block."""
            return inner
    finally:
        pass
    return inner
'''


def test_functions_and_their_bodies() -> None:
    assert list(functions_of(SOURCE)) == [
        ("Number of threads that are alive.", "# counted anew\nreturn len(self.threads)"),
        ("Found inside.", "if x:\n    return 1\nreturn 2"),
        ("Found in a block.", "return inner"),
    ]


def test_names_and_their_descriptions() -> None:
    assert list(names_of(SOURCE, "pools")) == [
        ("pools", "What the module is for."),
        ("ThreadPool", "Runs work in threads."),
    ]


def test_unique_pairs() -> None:
    pairs = [("A  b", "x"), ("a B", "y"), ("c", "Y"), ("d", "z"), ("seen", "w")]
    assert unique_pairs(pairs, exclude=["SEEN"]) == [("A  b", "x"), ("d", "z")]


def library(folder: Path, count: int) -> Path:
    """A standard library with ``count`` functions that can be told apart, and as many classes."""
    for number in range(count):
        (folder / f"m{number}.py").write_text(
            f'def f():\n    """Give number {number} of those that one can count here."""\n    return {number}\n\n\n'
            f'class Thing{number}:\n    """What has the property {number} of being itself."""\n'
        )
    hidden = 'def f():\n    """Nobody must find this one when looking for functions."""\n    return -1\n'
    for name in ("test", "site-packages", "lib/tests"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.py").write_text(hidden)
    (folder / "test_it.py").write_text(hidden)
    (folder / "broken.py").write_text("def f(:\n")
    return folder


def test_a_small_library_says_so(tmp_path: Path) -> None:
    root = library(tmp_path, 40)
    assert len(source_files(root)) == 41
    with pytest.warns(UserWarning, match="gives 10 code search and 40 identifier test pairs, not 500"):
        corpus = build_corpus(root)
    assert (len(corpus.train), len(corpus.test), len(corpus.identifiers)) == (30, 10, 40)
    assert {answer for _, answer in corpus.train + corpus.test} == {f"return {number}" for number in range(40)}
    assert ("thing3", "What has the property 3 of being itself.") in corpus.identifiers
    (tmp_path / "again").mkdir()
    elsewhere = library(tmp_path / "again", 40)
    with pytest.warns(UserWarning, match="gives 10 code search"):
        assert build_corpus(elsewhere) == corpus


def test_no_library_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 0 documented functions in .* needs the source files"):
        build_corpus(tmp_path)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return PythonCodeSearch().corpus()


def test_the_running_interpreter(corpus: Corpus) -> None:
    assert len(corpus.test) == len(corpus.identifiers) == 500
    assert len(corpus.train) > 2500
    assert all(len(query.split()) >= 8 for query, _ in corpus.train + corpus.test)
    for name, description in corpus.identifiers:
        assert not re.search(rf"\b({name}|{name.replace(' ', '')}|{name.replace(' ', '_')})\b", description.lower())


def test_no_text_twice(corpus: Corpus) -> None:
    def normal(text: str) -> str:
        return "".join(text.lower().split())

    pairs = corpus.train + corpus.test
    for side in (0, 1):
        counts = Counter(normal(pair[side]) for pair in pairs)
        assert max(counts.values()) == 1
        assert max(Counter(normal(pair[side]) for pair in corpus.identifiers).values()) == 1
    trained = {normal(query) for query, _ in corpus.train}
    assert not trained & {normal(text) for pair in corpus.identifiers for text in pair}


def test_pairs_are_in_the_library(corpus: Corpus) -> None:
    """Independent of the reader: each answer is Python that follows a docstring which holds its query."""
    docstrings: dict[str, list[str]] = {}
    for file in source_files(Path(sysconfig.get_paths()["stdlib"]) / "json"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
                docstrings.setdefault(" ".join(docstring.split()), []).append(body)
    found = 0
    for query, answer in corpus.train + corpus.test:
        for docstring, bodies in docstrings.items():
            if docstring.startswith(query) and ast.unparse(ast.parse("def f():\n    0\n")) and len(query) > 60:
                wrapped = "async def f():\n" + "".join(f" {line}\n" for line in answer.splitlines())
                tree = ast.parse(wrapped).body[0]
                assert isinstance(tree, ast.AsyncFunctionDef)
                assert "\n".join(ast.unparse(statement) for statement in tree.body) in bodies
                found += 1
    assert found >= 3


def test_datamodule(corpus: Corpus, tokenizer_folder: str, tokenizer: Any) -> None:
    data = PythonCodeSearch(batch_size=50, max_length=8, tokenizer_name_or_path=tokenizer_folder)
    assert data.test_names == ("code_search", "identifiers")
    data.setup("fit")
    data.setup("test")
    assert len(data.examples("val")) == round(0.05 * len(corpus.train))
    assert len(data.examples("train")) + len(data.examples("val")) == len(corpus.train)
    assert len(data.train_dataloader()) == len(data.examples("train")) // 50
    code, identifiers = data.test_dataloader()
    for loader, pairs in ((code, corpus.test), (identifiers, corpus.identifiers)):
        batches = list(loader)
        assert len(batches) == 10
        queries = [query for query, _ in pairs[:50]]
        expected = tokenizer(queries, truncation=True, max_length=8, padding=True, return_tensors="pt")
        assert batches[0]["query"]["input_ids"].equal(expected["input_ids"])
        assert batches[0]["query"]["attention_mask"].equal(expected["attention_mask"])


@pytest.mark.parametrize("options", [{"num_test": 0}, {"max_length": 0}, {"min_words": 0}, {"val_fraction": 1}])
def test_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"PythonCodeSearch: {next(iter(options))} is"):
        PythonCodeSearch(**options)
