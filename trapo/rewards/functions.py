r"""This file finds reward functions by name, and says what may be asked of them and answered by them.

| name | function |
| --- | --- |
| `math` | `math_reward`, the rules of this package |
| `math_verify` | math-verify's `parse` and `verify` on the whole text, for comparison with papers |
| `package.module:function`, `./file.py:function` | one of yours |

Yours may be written in three ways; which one is seen once, from its signature, before anything is generated. It may be
async. It returns a number (bool, NumPy scalar, array or tensor without dimensions), or a list of one for TRL's way.

    (text, answer)                          and, by name or as **row, any of: prompt (chat messages), id, source,
                                            and the other columns of the data (a name with a default, or **row)
    (completions, **columns)                TRL's, lists of one: prompts, answer (or solution, ground_truth), id, source
    (data_source, solution_str, ground_truth, extra_info=None)      verl's; a dict's "score" counts
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trapo.errors import TrapoError
from trapo.tools.imports import import_function

Row = Mapping[str, Any]
ROW_COLUMNS = ("prompt", "id", "source")  # what a row may hold beside its answer
_ANSWERS = ("answer", "solution", "ground_truth")  # names of one thing


@dataclass(frozen=True)
class RewardFunction:
    """Is a reward function as workers call it. call: (text, answer, row) -> whatever the function returns. wants_row:
    whether it looks at the row."""

    name: str
    call: Callable[[str, str, Row], Any]
    wants_row: bool = False
    graded: Callable[[str, str], tuple[float, str]] | None = None  # a value and the rule that gave it

    def __call__(self, text: str, answer: str, row: Row | None = None) -> float:
        """Raises TypeError or ValueError, in one line, for what is no finite number."""
        value = self.call(text, answer, row or {})
        if inspect.isawaitable(value):
            value = asyncio.run(_awaited(value))
        return as_number(value, self.name)


async def _awaited(value: Any) -> Any:
    return await value


def as_number(value: Any, name: str) -> float:
    """Returns `value` as a float: Python's numbers, and scalars of NumPy, torch and their kin."""
    plain = value
    if not isinstance(value, numbers.Real) and callable(getattr(value, "item", None)) and not getattr(value, "ndim", 0):
        plain = value.item()
    if not isinstance(plain, numbers.Real) or not math.isfinite(plain):
        raise ValueError(f"{name} must return a finite number; got {_shown(value)}")
    return float(plain)


def _shown(value: Any) -> str:
    try:
        return " ".join(f"{value!r:.100}".split())
    except Exception:
        return f"a {type(value).__name__}"


@functools.lru_cache(maxsize=16)
def resolve(name: str) -> RewardFunction:
    """Returns the function that `name` stands for. Raises TrapoError, in one line, for none and for a wrong
    signature."""
    if name in ("math", "math_verify"):
        if importlib.util.find_spec("math_verify") is None:
            raise TrapoError(f"reward {name!r} needs math-verify: pip install 'trapo-kernels[train]'")
        return _math() if name == "math" else RewardFunction(name, lambda text, answer, row: math_verify(text, answer))
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise TrapoError(
            f"reward must be 'math' or 'package.module:function'; got {name!r} "
            "(also accepted: 'math_verify' and './file.py:function')"
        )
    function = import_function(name, "reward")
    return _adapted(name, function)


def _math() -> RewardFunction:
    from trapo.rewards.rules import grade

    def graded(text: str, answer: str) -> tuple[float, str]:
        found = grade(text, answer)
        return found.value, found.rule

    return RewardFunction("math", lambda text, answer, row: graded(text, answer)[0], graded=graded)


def math_verify(text: str, answer: str) -> float:
    """Scores by math-verify alone, in its own configuration: the whole text against the gold between dollars."""
    from math_verify import parse, verify

    # It warns once that its timeouts are off; they need SIGALRM and the main thread.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = answer if "$" in answer.replace("\\$", "") else f"${answer}$"
    return float(verify(parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))


def _adapted(name: str, function: Callable[..., Any]) -> RewardFunction:
    """Returns the function behind one way to call it, by its signature."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C: nothing is known
        return RewardFunction(name, lambda text, answer, row: function(text, answer))
    if "completions" in parameters:
        return _trl(name, function, parameters)
    if "solution_str" in parameters:
        return _verl(name, function, parameters)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    extra = [p.name for p in parameters.values() if p.kind not in (*kinds, inspect.Parameter.VAR_POSITIONAL)]
    extra = [*[p.name for p in parameters.values() if p.kind in kinds][2:], *extra]
    # Those with a default are given where the data has such a column.
    optional = {n for n in extra if parameters[n].default is not inspect.Parameter.empty}
    extra = [n for n in extra if n in ROW_COLUMNS or n in optional]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    columns = ROW_COLUMNS if takes_any else tuple(extra)
    _check_call(name, function, ("", ""), dict.fromkeys(columns))

    def call(text: str, answer: str, row: Row) -> Any:
        named = row if takes_any else {c: row.get(c) for c in columns if c in row or c not in optional}
        return function(text, answer, **{k: v for k, v in named.items() if k not in ("text", "answer")})

    return RewardFunction(name, call, wants_row=bool(columns))


def _trl(name: str, function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> RewardFunction:
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def columns(text: str, answer: str, row: Row) -> dict[str, list[Any]]:
        given: dict[str, list[Any]] = {
            "completions": [text],
            "prompts": [row.get("prompt")],
            **{c: [answer] for c in _ANSWERS},
        }
        given |= {c: [row.get(c)] for c in row if c != "prompt"}
        return given if takes_any else {c: v for c, v in given.items() if c in parameters}

    _check_call(name, function, (), columns("", "", dict.fromkeys(ROW_COLUMNS)))

    async def first(values: Any) -> Any:
        return _only(await values, name)

    def call(text: str, answer: str, row: Row) -> Any:
        values = function(**columns(text, answer, {**dict.fromkeys(ROW_COLUMNS), **row}))
        return first(values) if inspect.isawaitable(values) else _only(values, name)

    return RewardFunction(name, call, wants_row=True)


def _only(values: Any, name: str) -> Any:
    if isinstance(values, str) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) != 1 or len(values) != 1:
        raise ValueError(f"{name} must return one reward for each of its completions; got {_shown(values)} for 1")
    return values[0]


def _verl(name: str, function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> RewardFunction:
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def columns(text: str, answer: str, row: Row) -> dict[str, Any]:
        given = {
            "data_source": row.get("source"),
            "solution_str": text,
            "ground_truth": answer,
            "extra_info": row.get("extra_info", dict(row)),
        }
        return given if takes_any else {c: v for c, v in given.items() if c in parameters}

    _check_call(name, function, (), columns("", "", {}))

    def call(text: str, answer: str, row: Row) -> Any:
        value = function(**columns(text, answer, row))
        return value["score"] if isinstance(value, dict) and "score" in value else value

    return RewardFunction(name, call, wants_row=True)


def _check_call(name: str, function: Callable[..., Any], values: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(*values, **named)
    except TypeError as error:
        raise TrapoError(
            f"reward {name!r} takes {inspect.signature(function)}, which cannot be called ({error}); it must take "
            f"(text, answer), with any of {', '.join(ROW_COLUMNS)} by name, or TRL's (completions, **columns)"
        ) from None
