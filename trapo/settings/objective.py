"""The keys objective.* are every field of `trapo_kernels.Objective`, made of its own fields: none can be forgotten."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import trapo_kernels as tk
from trapo.errors import TrapoError
from trapo.settings.keys import key
from trapo.tools.imports import import_function
from trapo_kernels.objective import REDUCTIONS

_HINTS = typing.get_type_hints(tk.Objective)
_DEFAULTS = tk.Objective()
# Terms: a name of a table, a function of the user's as package.module:function or ./file.py:function, or `none`.
TERMS = tuple(
    name for name, hint in _HINTS.items() if any(typing.get_origin(k) is Callable for k in typing.get_args(hint))
)
# An infinite clip is none: it takes away what a mode has set, which null does not.
_UNCLIPPED = ("clip_low", "clip_high", "dual_clip")


def _docs() -> dict[str, str]:
    """Returns what the docstring of Objective says of each of its fields."""
    lines = inspect.cleandoc(tk.Objective.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, doc in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n     +.*)*)", lines, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(doc.split()))
    return found


def _kind(name: str) -> type:
    """Returns the type of a field's key, without None: a function is given as text."""
    if name in TERMS:
        return str
    kinds = [k for k in typing.get_args(_HINTS[name]) or (_HINTS[name],) if k is not types.NoneType]
    return typing.cast(type, kinds[0])


def _group() -> type:
    docs, fields = _docs(), []
    more: dict[str, dict[str, Any]] = {
        "expert": {"said": ", ".join([*tk.EXPERT_TERMS, "a function, none"])},
        "policy": {"said": ", ".join([*tk.POLICY_TERMS, "a function, none"])},
        "reduction": {"said": ", ".join(REDUCTIONS)},
        "tis_cap": {"above": 0},
        "tis_mode": {"said": "clip, mask"},
        "tis_level": {"said": "token, sequence"},
        "pear_level": {"said": "token, block, sequence"},
        **{name: {"said": "number, inf"} for name in _UNCLIPPED},
    }
    for field in dataclasses.fields(tk.Objective):
        doc = docs.get(field.name, "")
        doc = doc.replace("(`own_term`)", "(package.module:function or ./file.py:function)")
        none = "none" if field.name in TERMS else "inf" if field.name in _UNCLIPPED else "null"
        made = key(
            None,
            (doc[:1].upper() + doc[1:] if doc[:2].isalpha() else doc).replace("None", none),
            **more.get(field.name, {}),
        )
        fields.append((field.name, typing.Optional[_kind(field.name)], made))  # noqa: UP045  (a type made at run time)
    made = dataclasses.make_dataclass("ObjectiveConfig", fields)
    made.__module__ = __name__
    made.__doc__ = "Fields of trapo_kernels.Objective; None keeps the mode's choice."
    return made


if typing.TYPE_CHECKING:
    ObjectiveConfig = Any
else:
    ObjectiveConfig = _group()


def given_fields(config: ObjectiveConfig) -> dict[str, Any]:
    """Returns what the configuration sets, as `Objective` takes it. Raises TrapoError for a function that cannot be
    had."""
    given = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    return {name: _value(name, value) for name, value in given.items()}


def own_terms(config: ObjectiveConfig) -> dict[str, str]:
    """Returns the functions of the user's that the terms name, by key."""
    return {f"objective.{name}": text for name in TERMS if ":" in (text := getattr(config, name) or "")}


def _value(name: str, value: Any) -> Any:
    if name in TERMS:
        if value.lower() == "none":
            return None
        return import_function(value, f"objective.{name}:") if ":" in value else value
    return None if name in _UNCLIPPED and value == math.inf else value


def make_objective(
    preset: Callable[..., tk.Objective], of_mode: Mapping[str, Any], given: Mapping[str, Any], mode: str
) -> tk.Objective:
    """Returns a preset of trapo_kernels, changed by the mode and then by what the configuration sets."""
    try:
        return preset(**{**of_mode, **given})
    except (TypeError, ValueError) as error:
        words = str(error)
        clash = [
            f"mode {mode} sets {name}={value!r}, which objective.{name}=inf takes away"
            for name, value in _chosen(preset(**of_mode)).items()
            if name in _UNCLIPPED and name not in given and f" {name} must be None" in words
        ]
        raise TrapoError(f"objective: {'; '.join([words, *clash])}") from error


def imitates(objective: tk.Objective) -> bool:
    """Returns whether it has a term on expert tokens."""
    return objective.expert is not None and objective.expert_coef != 0


def expert_reads(objective: tk.Objective) -> frozenset[str]:
    """Returns the inputs that change the expert term where they are given."""
    return tk.Objective(expert=objective.expert, policy=None).reads if imitates(objective) else frozenset()


def reads_behaviour(objective: tk.Objective) -> bool:
    """Returns whether the expert term has no value without old_logprobs, which are those of what wrote the traces. A
    function of a user's that reads them wants them, whatever default it has."""
    if not imitates(objective):
        return False
    needed = tk.Objective(expert=objective.expert, policy=None).needed
    return "old_logprobs" in (expert_reads(objective) if callable(objective.expert) else needed)


def overruled(objective: tk.Objective, given: Mapping[str, Any], mode: str) -> tuple[str, ...]:
    """Returns a line for each key that takes the place of what the mode would have: the key wins.

    objective: the mode's own. Fields that the mode leaves at their default are nobody's choice.
    """
    return tuple(
        f"objective.{name}={_shown(given[name])} takes the place of mode {mode}'s {_shown(value)}"
        for name, value in _chosen(objective).items()
        if name in given and given[name] != value
    )


def _chosen(objective: tk.Objective) -> dict[str, Any]:
    """Returns what makes an objective that of its mode: its terms, and every field that is not at its default."""
    values = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return {k: v for k, v in values.items() if k in TERMS or v != getattr(_DEFAULTS, k)}


def _shown(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value).lower()
