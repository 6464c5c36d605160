"""A key of the configuration is a dataclass field whose default, sentence and accepted values stand beside it."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from trapo.errors import TrapoError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says what a value must be where choices and a lower bound cannot say it; `words` complete the error's
    sentence."""

    words: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Key:
    """Is one key with all that is known of it. Every value is also checked by the field's type, and None by nothing."""

    name: str  # optim.lr
    hint: Any  # its type
    default: Any
    doc: str  # one sentence
    choices: Collection[str] = ()  # the words that are accepted; empty: any
    least: float | None = None
    above: float | None = None
    most: float | None = None
    named: bool = False  # a text that names something, and so may not be empty
    rule: Rule | None = None
    said: str = ""  # what is accepted, for people, where type, choices and bounds do not say it

    @property
    def accepts(self) -> str:
        """Returns what the key takes, for people: its choices, or its type with its bounds."""
        if self.said:
            said = self.said
        elif self.choices:
            said = ", ".join(self.choices)
        elif self.rule is not None:
            said = self.rule.words.removeprefix("must be ")
        else:
            bounds = [f"{sign} {end:g}" for sign, end, _ in self._bounds()]
            said = " ".join([_kind(self.hint), *bounds])
        return f"{said}, or null" if types.NoneType in typing.get_args(self.hint) else said

    def check(self, value: Any) -> None:
        """Raises TrapoError, in one line, for a value that is not accepted."""
        for text in _texts(value):
            self._check_text(text)
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise TrapoError(f"{self.name}: got {value!r}; accepted: {', '.join(self.choices)}")
        for sign, end, holds in self._bounds():
            if not (holds(value, end) and (isinstance(value, int) or math.isfinite(value))):
                raise TrapoError(f"{self.name}: got {value}; must be {sign} {end}, and finite")
        if self.rule is not None and not self.rule.holds(value):
            shown = list(value) if isinstance(value, (list, tuple, dict)) else value
            raise TrapoError(f"{self.name}: got {shown}; {self.rule.words}")

    def _bounds(self) -> list[tuple[str, float, Callable[[Any, Any], bool]]]:
        ends = ((">=", self.least, operator.ge), (">", self.above, operator.gt), ("<=", self.most, operator.le))
        return [(sign, end, holds) for sign, end, holds in ends if end is not None]

    def _check_text(self, text: str) -> None:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise TrapoError(f"{self.name}: got {text[:100]!r}; a text cannot hold NUL or bytes that are not UTF-8")
        if self.named and not text:
            raise TrapoError(f"{self.name}: got an empty text; leave it out or give it a value")


def key(
    default: T,
    doc: str,
    *,
    choices: Collection[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    named: bool = False,
    rule: Rule | None = None,
    said: str = "",
) -> T:
    """Makes a field of a group of keys. The arguments are those of `Key`: doc is one sentence, choices the accepted
    words, least and above the lower bounds (the value itself accepted, or not), most the upper one, named says that a
    text may not be empty."""
    known = {
        "doc": doc,
        "choices": choices,
        "least": least,
        "above": above,
        "most": most,
        "named": named,
        "rule": rule,
        "said": said,
    }
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=known)
    return dataclasses.field(default=default, metadata=known)


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """Yields every key of a configuration and of its groups, in their order."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from keys_of(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            yield Key(f"{prefix}{field.name}", hint, default, **field.metadata)


def value_of(config: Any, name: str) -> Any:
    """Returns the value of a key such as optim.lr."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_values(config: Any) -> None:
    """Raises TrapoError, in one line, for the first value of a configuration that its key does not accept."""
    for found in keys_of(type(config)):
        found.check(value_of(config, found.name))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _kind(hint: Any) -> str:
    """Returns a type in words."""
    arguments = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    origin = typing.get_origin(hint)
    if origin is list:
        return f"list of {_kind(arguments[0])}s"
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"{len(arguments)} {_kind(arguments[0])}s"
    return _KINDS.get(hint) or _kind(arguments[0])
