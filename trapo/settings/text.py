"""This file writes and reads a configuration's values: `key=value` overrides, YAML files, and back to YAML.

Text is taken as it stands. On the command line a text field gets every character after `=`: `#`, blanks, quotes, `${x}`
and all; the other fields are typed by the schema, never guessed from how the text looks. In a file YAML decides what is
text; a plain scalar that YAML would make a number or a bool (007, yes) is still text where the field is one.

OmegaConf resolves `${...}` in files. What such an expression takes from outside, `${oc.env:TOKEN}`, is used, and
nothing but the expression is ever written or shown: see `Expression`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trapo.errors import TrapoError
from trapo.settings.words import meant_key

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULL = "null"
_WHOLE = r"[+-]?[0-9]+(_[0-9]+)*"
_MARK = re.compile(r"(\\*)\$\{")  # an odd number of backslashes makes it text
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")
Tree = dict[str, Any]


class Expression(str):
    """Is a text that a resolver of OmegaConf gave, such as ${oc.env:TOKEN}; `source` is what the configuration says."""

    source: str

    def __new__(cls, value: str, source: str = "") -> Expression:
        made = super().__new__(cls, value)
        made.source = source
        return made


def read_yaml(path: Path, schema: type) -> Tree:
    """Returns a YAML file as nested dicts, with its expressions unresolved. Raises TrapoError in one line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = OmegaConf.load(io.StringIO(text))
        plain = OmegaConf.to_container(loaded, resolve=False)
        scalars = yaml.load(text, Loader=yaml.BaseLoader)
    except Exception as error:  # PyYAML's errors span lines; the first says what
        raise TrapoError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise TrapoError(f"{path}: expected a mapping of configuration keys, got {type(loaded).__name__}")
    return typing.cast(Tree, _as_text(plain, scalars, schema))


def override_tree(item: str, schema: type) -> Tree:
    """Returns what `key=value` says, as nested dicts. Raises TrapoError with one line that names the key."""
    key, mark, text = item.partition("=")
    if not mark:
        raise TrapoError(f"override {item!r}: expected key=value, such as train.steps=20")
    hint: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        if dataclasses.is_dataclass(hint):
            hint = _field(hint, part, "".join(f"{p}." for p in parts[:i]), schema)
        elif typing.get_origin(hint) is dict or hint is Any:
            hint = Any
        else:
            raise TrapoError(f"{'.'.join(parts[:i])}: has no keys of its own; got {key}")
    value = _typed(key, text, hint)
    for part in reversed(parts):
        value = {part: value}
    return typing.cast(Tree, value)


def merge_trees(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """Returns `base` with what `changes` has in its place."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            merge_trees(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) and value else value
        )
    return merged


def check_keys(node: Any, schema: type, prefix: str = "", root: type | None = None) -> None:
    """Raises TrapoError for a key that the schema does not have, and for one that has no value yet.

    root: the whole configuration, where node and schema are the group at `prefix` of it.
    """
    for key, value in node.items():
        child = _field(schema, key, prefix, root or schema)
        if dataclasses.is_dataclass(child):
            if not isinstance(value, Mapping):
                raise TrapoError(f"{prefix}{key}: expected a group of keys, got {value!r}")
            check_keys(value, typing.cast(type, child), f"{prefix}{key}.", root or schema)
        elif any(leaf == "???" for leaf in _leaves(value)):
            raise TrapoError(f"{prefix}{key}: got ???; give it a value")


def mark_expressions(config: Any, unresolved: Tree) -> Any:
    """Puts `Expression`s into the configuration (or a part of it) where the tree that it was made of has resolvers."""
    secrets = {str(value) for value, source in _pairs(config, unresolved) if _RESOLVER.search(source)} - {""}

    def marked(value: Any, source: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for f in dataclasses.fields(value):
                setattr(value, f.name, marked(getattr(value, f.name), source.get(f.name)))
            return value
        if isinstance(value, dict) and isinstance(source, Mapping):
            return {k: marked(v, source.get(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and isinstance(source, (list, tuple)):
            return type(value)(marked(v, s) for v, s in zip(value, source, strict=True))
        outside = is_expression(source) and (
            _RESOLVER.search(source) or any(secret in str(value) for secret in secrets)
        )
        return Expression(value, source) if isinstance(value, str) and outside else value

    return marked(config, unresolved)


def tree_of(config: Any) -> Tree:
    """Returns a configuration as nested dicts, which say all that it says; a tree is one already."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return typing.cast(Tree, config)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a tree by their dotted names; an empty mapping has none."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return found


def plain_tree(config: Any) -> Tree:
    """Returns a configuration, or its tree, for people and services: expressions that reach outside stay as they
    are."""
    return typing.cast(Tree, _map_texts(_shown, tree_of(config)))


def to_yaml(config: Any) -> str:
    """Returns YAML that `read_yaml` and OmegaConf's resolving turn into an equal configuration; config: it, or its
    tree."""
    tree = _map_texts(lambda s: s.source if isinstance(s, Expression) else escape(s), tree_of(config))
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def shown_yaml(path: Path) -> Tree:
    """Returns what a saved configuration says, for people: nothing is resolved, nothing escaped."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise TrapoError(f"{path}: not readable as YAML: {one_line(error)}") from error
    return typing.cast(Tree, _map_texts(unescape, tree if isinstance(tree, dict) else {}))


def escape(text: str) -> str:
    """Returns a text as OmegaConf has to be given it so that nothing in it is an expression."""
    return _MARK.sub(lambda m: m[1] * 2 + "\\${", text)


def unescape(text: str) -> str:
    """Returns the text that was escaped; one with expressions is left as it is."""
    if is_expression(text):
        return text
    return _MARK.sub(lambda m: m[1][: len(m[1]) // 2] + "${", text)


def is_expression(text: Any) -> bool:
    """Returns whether OmegaConf would resolve something in it."""
    return isinstance(text, str) and any(len(m[1]) % 2 == 0 for m in _MARK.finditer(text))


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _field(schema: Any, key: Any, prefix: str, root: type) -> Any:
    hints = typing.get_type_hints(schema)
    if key not in hints:
        meant = meant_key(str(key), prefix, hints, root)
        raise TrapoError(f"{prefix}{key}: unknown key; did you mean {meant}? (known: {', '.join(hints)})")
    return hints[key]


def _typed(key: str, text: str, hint: Any) -> Any:
    """Returns the value of an override."""
    kinds = [k for k in typing.get_args(hint) if k is not types.NoneType] if _is_optional(hint) else [hint]
    kind = kinds[0]
    if _is_optional(hint) and (text == _NULL or (kind is not str and text in ("", "~"))):
        return None
    if kind is str:
        return escape(text)
    if str in kinds and not re.fullmatch(_WHOLE, text.strip()):  # a number or a word
        return escape(text)
    if kind in (int, float, bool):
        return text if is_expression(text) else _number(key, text, kind)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]), resolve=False)["x"]  # type: ignore[index, call-overload]
        scalars = yaml.load(text, Loader=yaml.BaseLoader)
    except Exception as error:  # PyYAML's
        raise TrapoError(f"override {f'{key}={text}'!r}: not readable: {one_line(error)}") from error
    if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
        raise TrapoError(f"{key}: expected a group of keys, got {value!r}")
    return _map_texts(escape, _as_text(value, scalars, kind))


def _number(key: str, text: str, kind: type) -> Any:
    bare = text.strip()
    try:
        if kind is bool:
            return _BOOLS[bare.lower()]
        if kind is int:
            if not re.fullmatch(_WHOLE, bare):
                raise ValueError
            return int(bare)
        return float(bare.replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise TrapoError(f"{key}: got {text[:100]!r}; expected {expected}") from None


def _as_text(value: Any, scalars: Any, hint: Any) -> Any:
    """Returns `value` as YAML typed it, with the text of the file (`scalars`) wherever the schema wants a text."""
    if _is_optional(hint):
        hint = next(k for k in typing.get_args(hint) if k is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict) and isinstance(scalars, dict):
        hints = typing.get_type_hints(hint)
        return {k: _as_text(v, scalars.get(k), hints.get(k, Any)) for k, v in value.items()}
    if typing.get_origin(hint) is list and isinstance(value, list) and isinstance(scalars, list):
        (item,) = typing.get_args(hint)
        return [_as_text(v, s, item) for v, s in zip(value, scalars, strict=True)]
    if hint is str and isinstance(scalars, str) and value is not None and not isinstance(value, (str, dict, list)):
        return scalars
    return value


def _is_optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _map_texts(function: Any, node: Any) -> Any:
    """Returns the node with function(text) for every text in it, keys aside."""
    if isinstance(node, dict):
        return {k: _map_texts(function, v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_map_texts(function, v) for v in node]
    return function(node) if isinstance(node, str) else node


def _shown(text: str) -> str:
    return text.source if isinstance(text, Expression) else text


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, (Mapping, list, tuple)):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _leaves(value)
    else:
        yield node


def _pairs(value: Any, source: Any) -> Iterator[tuple[Any, str]]:
    """Returns (value, source) of everything that an expression gave."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and isinstance(source, Mapping):
        for key in value.keys() & source.keys():
            yield from _pairs(value[key], source[key])
    elif isinstance(value, (list, tuple)) and isinstance(source, (list, tuple)):
        for v, s in zip(value, source, strict=True):
            yield from _pairs(v, s)
    elif is_expression(source):
        yield value, source
