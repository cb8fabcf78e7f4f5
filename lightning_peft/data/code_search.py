"""Code search on Python's own standard library: real text that every machine has, for the quickstart.

A query is the first paragraph of a function's docstring; its answer is the body of that function. Everything is read
from the source files of the running interpreter with ``ast``; nothing is imported, run or downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.data.base import Split, TokenisedDataModule, split_off
from lightning_peft.data.text_pairs import tokenise_pairs
from lightning_peft.errors import ConfigError

__all__ = [
    "Corpus",
    "PythonCodeSearch",
    "build_corpus",
    "functions_of",
    "names_of",
    "source_files",
    "split_identifier",
    "unique_pairs",
    "without_name",
]

NOT_LIBRARY = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
SAYS_NOTHING = {"", "...", "pass", "raise NotImplementedError", "raise NotImplementedError()"}
MIN_DESCRIPTION_WORDS = 4

Pair = tuple[str, str]


class Corpus(NamedTuple):
    """Pairs of query and answer; no query and no answer occurs twice in ``train`` and ``test`` together.

    Args:
        train: Docstring and function body, to train on.
        test: The same, held out.
        identifiers: Words of the name of a class or module, and what its docstring says of it; never trained on.
    """

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    identifiers: tuple[Pair, ...]


def source_files(root: Path) -> list[Path]:
    """Return the Python files of a standard library, sorted, without its tests and what is installed beside it."""
    return sorted(
        file
        for file in root.rglob("*.py")
        if NOT_LIBRARY.isdisjoint(file.relative_to(root).parts) and not file.name.startswith("test_")
    )


def first_paragraph(docstring: str) -> str:
    """Return the text up to the first empty line, on one line."""
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def functions_of(source: str) -> Iterator[Pair]:
    r"""Yield first docstring paragraph and body of each function and method that has both, in order of the file.

    The body is the source text after the docstring, comments included.

    Example:
        >>> list(functions_of('def f(x):\n    "Add one.\n\n    Always."\n    return x + 1\n'.replace('"', '"' * 3)))
        [('Add one.', 'return x + 1')]
    """
    lines = source.splitlines()
    for node in _documented(_parse(source), ast.FunctionDef, ast.AsyncFunctionDef):
        docstring, following = node.body[0], node.body[1:]
        if following and following[0].lineno > docstring.end_lineno:
            body = textwrap.dedent("\n".join(lines[docstring.end_lineno : node.end_lineno])).strip()
            if " ".join(body.split()) not in SAYS_NOTHING:
                yield first_paragraph(ast.get_docstring(node) or ""), body


def names_of(source: str, module: str) -> Iterator[Pair]:
    """Yield name and first docstring sentence of a module and of each class in it."""
    for node in _documented(_parse(source), ast.Module, ast.ClassDef):
        sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", first_paragraph(ast.get_docstring(node) or ""))[0]
        yield (module if isinstance(node, ast.Module) else node.name), sentence


@lru_cache(maxsize=1)  # functions and names of a file are asked for in turn
def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in somebody's string
        return ast.parse(source)


def _documented(tree: ast.Module, *kinds: type[ast.AST]) -> Iterator[Any]:
    """Yield the nodes of these kinds that have a docstring, in order of the file."""
    remaining: list[ast.AST] = [tree]
    while remaining:
        node = remaining.pop()
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):  # pyright: ignore[reportArgumentType]
            yield node
        blocks = [getattr(node, name, ()) for name in ("body", "handlers", "orelse", "finalbody", "cases")]
        inside = [child for block in blocks for child in block if isinstance(block, list)]
        remaining += reversed(inside)  # a definition can only be among the statements of a block


def split_identifier(name: str) -> str:
    """Return the words of an identifier in lower case.

    Example:
        >>> split_identifier("HTTPBasicAuthHandler"), split_identifier("_base64_mime")
        ('http basic auth handler', 'base64 mime')
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\W_]+", name.lower())).strip()


def without_name(text: str, words: str) -> str:
    """Return a text without a name, however it is written; its words alone stay.

    Example:
        >>> without_name("SimpleQueue: a simple queue, not a Queue.", "simple queue")
        ': a , not a Queue.'
    """
    name = "[ _-]?".join(map(re.escape, words.split()))
    return " ".join(re.sub(rf"\b{name}\b", "", text, flags=re.IGNORECASE).split())


def unique_pairs(pairs: Iterable[Pair], exclude: Iterable[str] = ()) -> list[Pair]:
    """Return the pairs whose query and answer both occur for the first time; case and white space do not count.

    Args:
        pairs: Query and answer.
        exclude: Texts that count as seen.
    """
    seen = {_normal(text) for text in exclude}
    queries, answers, kept = set(seen), set(seen), []
    for query, answer in pairs:
        if _normal(query) not in queries and _normal(answer) not in answers:
            kept.append((query, answer))
        queries.add(_normal(query))
        answers.add(_normal(answer))
    return kept


def _normal(text: str) -> str:
    return "".join(text.lower().split())


def _by_hash(pairs: Iterable[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: hashlib.sha256(_normal(pair[0]).encode()).digest())


@lru_cache(maxsize=4)
def build_corpus(root: Path, min_words: int = 8, num_test: int = 500) -> Corpus:
    """Return the corpus of a standard library: a pure function of its source files, kept in memory.

    Which pair is held out depends on the hash of its query alone, so it is the same on every run and process. Where
    there are too few pairs for two test sets of ``num_test``, the sets are smaller, and a warning says so.

    Args:
        root: Folder of the library.
        min_words: Words a query has at least.
        num_test: Pairs in each test set.

    Raises:
        ConfigError: If there are hardly any documented functions, as in an installation without source files.
    """
    functions: list[Pair] = []
    names: list[Pair] = []
    for file in source_files(root):
        try:
            with tokenize.open(file) as lines:
                source = lines.read()
            module = file.parent.name if file.stem == "__init__" else file.stem
            in_file = list(functions_of(source)), list(names_of(source, module))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue  # not written for this interpreter
        functions += in_file[0]
        names += in_file[1]
    functions = _by_hash(unique_pairs(pair for pair in functions if len(pair[0].split()) >= min_words))
    if len(functions) < 20:
        raise ConfigError(
            f"PythonCodeSearch found {len(functions)} documented functions in {str(root)!r}; it needs the source files "
            "of Python's standard library, which this installation does not seem to have"
        )
    count = min(num_test, len(functions) // 4)
    test, train = functions[:count], functions[count:]
    described = {}
    for name, sentence in names:
        words = split_identifier(name)
        description = without_name(sentence, words)
        num_words = len(re.findall(r"\w+", description))
        # seventy codecs say the same; a class often has the name of its module
        if len(words) > 2 and num_words >= MIN_DESCRIPTION_WORDS and "Character Mapping Codec" not in sentence:
            described.setdefault(words.replace(" ", ""), (words, description))
    unique = unique_pairs(described.values(), exclude=[query for query, _ in train])
    identifiers = _by_hash(unique)[:num_test]
    if count < num_test or len(identifiers) < num_test:
        rank_zero_warn(
            f"PythonCodeSearch: this Python's standard library gives {count} code search and {len(identifiers)} "
            f"identifier test pairs, not {num_test}; ranks are not comparable to those among {num_test}",
            category=UserWarning,
        )
    return Corpus(tuple(train), tuple(test), tuple(identifiers))


class PythonCodeSearch(TokenisedDataModule):
    """Code search on the running Python's standard library: the function that a sentence describes.

    Training and the first test set ask for the body of a function (docstring removed) by the first paragraph of its
    docstring. The second test set is a skill that must not be lost and is never trained on: which description belongs
    to the name of this class or module, with the name itself taken out of it. ``test_names`` says which is which.
    No text occurs twice, within a set or across. Batches are those of :class:`~lightning_peft.TextPairs`. The texts
    depend on the Python version: compare results of one version only.

    Args:
        batch_size: Pairs per batch and process; more make the training task harder and the gradient better.
        max_length: Tokens per text at most; 32 trains twice as fast as 64, and 64 finds more.
        min_words: Words a query has at least.
        num_test: Pairs in each test set; the fewer, the easier to rank first.
        val_fraction: Share of the training pairs to validate on, in [0, 1).
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If Python's standard library has no source files here, or there is no tokenizer.
    """

    test_names = ("code_search", "identifiers")

    def __init__(
        self,
        batch_size: int = 32,
        max_length: int = 32,
        min_words: int = 8,
        num_test: int = 500,
        val_fraction: float = 0.05,
        tokenizer_name_or_path: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer_name_or_path=tokenizer_name_or_path, batch_size=batch_size, num_workers=num_workers, seed=seed
        )
        if not 0 <= val_fraction < 1:
            raise ConfigError(f"PythonCodeSearch: val_fraction is {val_fraction}, it must be in [0, 1)")
        for name, value in (("max_length", max_length), ("min_words", min_words), ("num_test", num_test)):
            if value < 1:
                raise ConfigError(f"PythonCodeSearch: {name} is {value}, at least 1 is needed")
        self.drop_last = True
        self.max_length = max_length
        self.min_words = min_words
        self.num_test = num_test
        self.val_fraction = val_fraction

    def corpus(self) -> Corpus:
        """Return the texts."""
        return build_corpus(Path(sysconfig.get_paths()["stdlib"]), self.min_words, self.num_test)

    def make_examples(self, split: Split) -> dict[str, Sequence[Any]]:
        """Tokenise the test sets, or training and validation pairs together."""
        corpus = self.corpus()
        if split == "test":
            sets = (corpus.test, corpus.identifiers)
            return {"test": [tokenise_pairs(self.tokenizer, pairs, self.max_length) for pairs in sets]}
        everything = tokenise_pairs(self.tokenizer, corpus.train, self.max_length)
        keep, off = split_off(len(everything), self.val_fraction, self.seed)
        return {"train": [everything[index] for index in keep], "val": [everything[index] for index in off]}

    def test_dataloader(self) -> list[Any]:
        """Return a loader for each of ``test_names``."""
        return [self.loader(examples) for examples in self.examples("test")]
