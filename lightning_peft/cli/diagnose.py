"""Find the mistakes in a command line and its configuration files, and say them in a few lines.

jsonargparse decides whether a configuration is valid; this module only runs after it said no. Its messages name types
and unions but seldom the place, so the files and options are walked a second time, against the parser's own options
and the constructors of the classes they name, and every mistake found is reported with its file and line (or option)
and the nearest valid name. If the walk finds nothing, the parser's own message is shortened.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import enum
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_peft.errors import nearest, suggest

__all__ = ["UsageError", "diagnose"]

_MAX_LINES = 6
_MAX_WIDTH = 200
_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
_CONTAINERS = (list, tuple, set, dict, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Mapping)
_NOT_IN_FILES = ("config", "print_config")  # options of the command line itself
_NO_VALUE = "null"


class UsageError(Exception):
    """A command line or configuration that the parser refused.

    Args:
        message: What the parser said.
        parser: The parser that said it.
    """

    def __init__(self, message: str, parser: argparse.ArgumentParser) -> None:
        super().__init__(message)
        self.parser = parser


def diagnose(parser: argparse.ArgumentParser, args: list[str], message: str) -> list[str]:
    """Return the mistakes in ``args``, each as one or two lines.

    Args:
        parser: The parser that refused ``args``, or a parser above or below it.
        args: The command and its options.
        message: What the parser said; used if the walk finds no mistake.
    """
    walk = _Walk()
    with contextlib.suppress(Exception):  # the walk explains an error; it must never hide it behind another
        options = _options(_command_parser(parser, args[0]))
        walk.command_line({name: hint for name, hint in options.items() if name not in _NOT_IN_FILES}, args[1:])
    return list(dict.fromkeys(walk.mistakes)) or [_shorten(message)]


def _command_parser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    while hasattr(parser, "parent_parser"):
        parser = parser.parent_parser  # pyright: ignore[reportAttributeAccessIssue]
    for action in parser._actions:
        if isinstance(action.choices, dict) and command in action.choices:
            return action.choices[command]
    return parser


def _options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Map each option of ``parser`` to its type hint."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        name = next((o[2:] for o in action.option_strings if o.startswith("--")), "")
        if name and name != "help" and not name.endswith(".help"):
            found[name] = getattr(action, "_typehint", None) or action.type
    return found


def _class_options(cls: type) -> dict[str, Any]:
    """Map each argument of the constructor of ``cls`` to its type hint."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    return _options(parser)


def _component_types(hint: Any) -> tuple[type, ...]:
    """Return the classes in ``hint`` that are given as ``class_path`` and ``init_args``."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is collections.abc.Callable:
        return _component_types(arguments[-1]) if arguments else ()
    if origin in (typing.Union, types.UnionType, *_CONTAINERS):
        return tuple(dict.fromkeys(found for argument in arguments for found in _component_types(argument)))
    plain = (str, bytes, int, float, complex, PurePath, enum.Enum, *(c for c in _CONTAINERS if isinstance(c, type)))
    is_component = inspect.isclass(hint) and hint.__module__ not in ("builtins", "datetime", "typing", "torch")
    return (hint,) if is_component and not issubclass(hint, plain) else ()


def _subclasses(base: type) -> Iterator[type]:
    yield base
    for sub in base.__subclasses__():
        yield from _subclasses(sub)


def _known_classes(bases: Iterable[type]) -> dict[str, type]:
    """Public subclasses by short name; the names of this package first, so that they are suggested first."""
    found = {
        cls.__name__: cls
        for base in bases
        for cls in _subclasses(base)
        if not cls.__name__.startswith("_") and "<locals>" not in cls.__qualname__ and not inspect.isabstract(cls)
    }
    return dict(sorted(found.items(), key=lambda item: not item[1].__module__.startswith("lightning_peft.")))


class _Walk:
    """Collects mistakes; remembers which class each option holds, as later options may set its arguments."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self._classes: dict[str, type] = {}

    def command_line(self, options: dict[str, Any], args: list[str]) -> None:
        """Walk the options behind a command."""
        position = 0
        while position < len(args):
            token = args[position]
            position += 1
            if not token.startswith("-"):
                self.mistakes.append(f"{token!r} is not an option. Options start with '--'.")
                continue
            name, equals, value = token.partition("=")
            name = "config" if name == "-c" else name.removeprefix("--")
            if not equals:
                if position < len(args) and not args[position].startswith("--"):
                    value = args[position]
                    position += 1
                else:
                    value = _NO_VALUE
            if name == "config":
                self._file(options, value)
            elif name not in ("-h", "help", *_NOT_IN_FILES) and not name.endswith(".help"):
                self._dotted(options, "", name, value, f"--{name}")

    def _file(self, options: dict[str, Any], name: str) -> None:
        path = Path(name)
        if not path.is_file():
            if "\n" not in name and "{" not in name:
                self.mistakes.append(_no_such_file(path))
            return
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.mistakes.append(f"{name}:{line}: this is not valid YAML: {error.problem or error.context}.")
            return
        if isinstance(root, yaml.MappingNode):
            self._mapping(options, "", root, name, "")
        elif root is not None:
            self.mistakes.append(f"{name}:1: a configuration is a mapping such as `trainer:`, not {_show(root)}.")

    def _mapping(self, options: dict[str, Any], prefix: str, node: yaml.MappingNode, place: str, path: str) -> None:
        """Walk a mapping whose keys are ``options`` that start with ``prefix``; ``path`` is where it lies."""
        for key_node, value in node.value:
            key = str(key_node.value)
            name = prefix + key.removesuffix("+")
            where = f"{place}:{key_node.start_mark.line + 1}"
            full = f"{path}.{key.removesuffix('+')}" if path else key.removesuffix("+")
            if any(option.startswith(f"{name}.") for option in options):
                if isinstance(value, yaml.MappingNode):
                    self._mapping(options, f"{name}.", value, place, full)
                elif isinstance(value, yaml.SequenceNode):
                    self.mistakes.append(f"{where}: {full!r} is a mapping, not a list.")
            elif name in options:
                self._value(options[name], value, where, place, full)
            else:
                siblings = {option[len(prefix) :].partition(".")[0] for option in options if option.startswith(prefix)}
                owner = f"of {path}" if path else "of this command"
                if path in self._classes:
                    owner = f"of {self._classes[path].__name__} ({path})"
                hint = _same_leaf(key, options) if not prefix and not path else ""
                self.mistakes.append(f"{where}: {key!r} is not an option {owner}.\n  {hint or suggest(key, siblings)}")

    def _value(self, hint: Any, node: yaml.Node, where: str, place: str, path: str) -> None:
        types_ = _component_types(hint)
        if types_ and not (isinstance(node, yaml.ScalarNode) and _accepts(hint, node)):
            self._component(hint, types_, node, where, place, path)
        elif types_:
            self._remember(types_, node, path)
        elif hint is not None and not _accepts(hint, node):
            text = f"{where}: {path!r} expects {_type_name(hint)}, got {_show(node)}."
            choices = [str(choice) for choice in _literals(hint)]
            more = suggest(str(node.value), choices) if isinstance(node, yaml.ScalarNode) and choices else ""
            self.mistakes.append(f"{text}\n  {more}" if more else text)

    def _remember(self, bases: tuple[type, ...], node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.ScalarNode):
            cls = _resolve(str(node.value), bases)
            if inspect.isclass(cls):
                self._classes[path] = cls

    def _component(
        self, hint: Any, bases: tuple[type, ...], node: yaml.Node, where: str, place: str, path: str
    ) -> None:
        """Walk a class given by name, by ``class_path`` and ``init_args``, or a list of these."""
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                item_where = f"{place}:{item.start_mark.line + 1}" if place else where
                self._component(hint, bases, item, item_where, place, path)
        elif isinstance(node, yaml.ScalarNode):
            if node.tag != "tag:yaml.org,2002:str":
                if not _accepts(hint, node):
                    self.mistakes.append(f"{where}: {path!r} expects {_type_name(hint)}, got {_show(node)}.")
            elif not Path(node.value).is_file():
                self._class(node.value, bases, where, path)
        elif isinstance(node, yaml.MappingNode):
            items = {str(key.value): (key, value) for key, value in node.value}
            cls = self._classes.get(path)
            if "class_path" in items:
                key, value = items["class_path"]
                line = f"{place}:{key.start_mark.line + 1}" if place else where
                cls = self._class(str(value.value), bases, line, path)
            elif cls is not None and not any(nearest(name, _SPEC_KEYS) for name in items):
                self._arguments(cls, node, place, path)
                return
            for name, (key, _) in items.items():
                if name not in _SPEC_KEYS:
                    line = f"{place}:{key.start_mark.line + 1}" if place else where
                    text = f"{line}: {name!r} does not belong beside class_path of {path}."
                    if cls is not None and name in _class_options(cls):
                        text += f"\n  It is an argument of {cls.__name__}: put it under 'init_args'."
                    else:
                        text += f"\n  {suggest(name, _SPEC_KEYS)}"
                    self.mistakes.append(text)
            arguments = items.get("init_args", (None, None))[1]
            if cls is not None and isinstance(arguments, yaml.MappingNode):
                self._arguments(cls, arguments, place, path)

    def _arguments(self, cls: type, node: yaml.MappingNode, place: str, path: str) -> None:
        self._classes[path] = cls
        self._mapping(_class_options(cls), "", node, place, path)

    def _class(self, name: str, bases: tuple[type, ...], where: str, path: str) -> type | None:
        found = _resolve(name, bases)
        if inspect.isclass(found):
            self._classes[path] = found
            return found
        if isinstance(found, str):
            self.mistakes.append(f"{where}: {found}")
        return None

    def _dotted(self, options: dict[str, Any], path: str, name: str, value: str, where: str) -> None:
        """Walk ``--name value`` where ``name`` may reach into the arguments of a class."""
        plain = name.removesuffix("+")
        if any(option.startswith(f"{plain}.") for option in options):
            return  # a whole group from a file or as a mapping
        if plain in options:
            node = yaml.compose(value, Loader=yaml.SafeLoader) if value.strip() else None
            full = f"{path}.{plain}" if path else plain
            if node is not None:
                self._value(options[plain], node, where, "", full)
            return
        owner = max((o for o in options if plain.startswith(f"{o}.")), key=len, default=None)
        if owner is not None and _component_types(options[owner]):
            full = f"{path}.{owner}" if path else owner
            rest = plain[len(owner) + 1 :].removeprefix("init_args.")
            if rest == "class_path":
                self._class(value, _component_types(options[owner]), where, full)
            elif not rest.startswith("dict_kwargs"):
                self._argument(options[owner], full, rest, value, where)
            return
        choices = list(options)
        if path in self._classes:
            text = f"{self._classes[path].__name__} has no argument {plain!r}."
        else:
            text = f"{where} is not an option of this command."
            choices = [f"--{choice}" for choice in options]
            plain = f"--{plain}"
        hint = _same_leaf(plain, options) or suggest(plain, choices)
        self.mistakes.append(f"{text if text.startswith(where) else f'{where}: {text}'}\n  {hint}")

    def _argument(self, hint: Any, path: str, rest: str, value: str, where: str) -> None:
        cls = self._classes.get(path)
        if cls is not None:
            self._dotted(_class_options(cls), path, rest, value, where)
            return
        names = " or ".join(t.__name__ for t in _component_types(hint))
        plus = "+" if any(typing.get_origin(t) is list for t in (hint, *typing.get_args(hint))) else ""
        self.mistakes.append(f"{where}: there is no {names} yet to set {rest!r} of. Name it first: --{path}{plus}=NAME")


def _resolve(name: str, bases: tuple[type, ...]) -> type | str | None:
    """Return the class ``name`` means, or a sentence on why there is none, or None if that cannot be told."""
    known = _known_classes(bases)
    base_names = " or ".join(base.__name__ for base in bases)
    if "." not in name:
        return known.get(name) or f"{name!r} is not the name of a {base_names}.\n  {suggest(name, known)}"
    module_name, _, leaf = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        close = nearest(leaf, known, limit=1)
        more = f"\n  Did you mean '{known[close[0]].__module__}.{close[0]}' (or short {close[0]!r})?" if close else ""
        return f"there is no module {error.name!r} to import {leaf!r} from.{more}"
    except Exception as error:
        return f"importing {module_name!r} failed: {type(error).__name__}: {error}"
    if not hasattr(module, leaf):
        return f"module {module_name!r} has no {leaf!r}.\n  {suggest(leaf, [n for n in dir(module) if n[0] != '_'])}"
    found = getattr(module, leaf)
    if inspect.isclass(found) and not issubclass(found, bases):
        return f"{name!r} is a class, but not a {base_names}."
    return found if inspect.isclass(found) else None


def _accepts(hint: Any, node: yaml.Node) -> bool:
    """Whether jsonargparse takes the value for this type."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:
        return True  # a type that cannot be checked alone
    try:
        if isinstance(node, yaml.ScalarNode):
            parser.parse_args([f"--value={node.value}"])
        else:
            constructor = yaml.SafeLoader("")
            parser.parse_object({"value": constructor.construct_object(node, deep=True)})
    except argparse.ArgumentError:
        return False
    return True


def _literals(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for argument in typing.get_args(hint) for choice in _literals(argument)]


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is not None and arguments:
        inner = ", ".join(_type_name(argument) for argument in arguments if argument is not ...)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _same_leaf(name: str, options: Iterable[str]) -> str:
    """Suggest the options whose last part is ``name``, such as ``trainer.max_steps`` for ``max_steps``."""
    dashes = "--" if name.startswith("--") else ""
    leaf = name.removeprefix("--")
    same = [option for option in options if option.rpartition(".")[2] == leaf and option != leaf]
    return f"Did you mean {' or '.join(repr(dashes + option) for option in same[:3])}?" if same else ""


def _no_such_file(path: Path) -> str:
    """Say which file was meant."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    files = [str(p) for p in sorted(folder.rglob("*.y*ml"))] if folder != Path(".") else []
    files += [str(p) for p in sorted(Path(".").glob("*.y*ml"))]
    if Path("configs").is_dir():
        files += [str(p) for p in sorted(Path("configs").rglob("*.y*ml"))]
    same_name = [file for file in files if Path(file).name == path.name]
    hint = f"Did you mean {same_name[0]!r}?" if same_name else suggest(str(path), files)
    return f"there is no configuration file {str(path)!r}.\n  {hint}".rstrip()


def _shorten(message: str) -> str:
    required = re.search(r"arguments are required: ([^\n]+)", message)
    if required:
        inside = re.search(r'Parser key "([\w.]+)"', message)
        names = [f"{inside[1]}.{n}" if inside else n.partition(".")[2] or n for n in required[1].strip().split(", ")]
        options = " and ".join(f"--{name}" for name in names)
        return f"{options} must be given.\n  Set it on the command line, or in a configuration file with --config."
    lines = [line.rstrip() for line in message.strip().splitlines() if line.strip()]
    lines = [line if len(line) <= _MAX_WIDTH else f"{line[:_MAX_WIDTH]}..." for line in lines]
    return "\n".join(lines[:_MAX_LINES] + (["  ..."] if len(lines) > _MAX_LINES else []))
