"""Triton's interpreter, with what it does again at every call of a function done once.

For each launch, and for each function that a kernel calls, it looks through all names of `triton.language` for those to
replace by ones that compute with numpy: half of its time. What it replaces, and by what, stays its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def quicken() -> None:
    """Does nothing where this version of Triton has no such parts: then it is slower, and right as well."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_patch_builtin", "_patch_attr", "tl")):
        return
    tl, real, call = interpreter.tl, interpreter._patch_lang, interpreter.GridExecutor.__call__
    places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    builtins = {place: [m for m in inspect.getmembers(place) if tl.core.is_builtin(m[1])] for place in places}
    nothing_to_restore = interpreter._LangPatchScope()
    running: list[list[Any]] = []  # of the kernel that runs: the languages whose names are replaced

    @functools.cache
    def seen_by(fn: Any) -> list[Any]:
        return [value for value in fn.__globals__.values() if value is tl or value is tl.core]

    def replace_builtins(place: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins[place]:
            if getattr(place, name) is member:  # and not replaced already, by the kernel that calls this function
                interpreter._patch_attr(place, name, member, builder, scope)

    def replace(fn: Any) -> Any:
        if running and all(language in running[-1] for language in seen_by(fn)):
            return nothing_to_restore
        scope = real(fn)
        if running:
            running[-1] += seen_by(fn)
        return scope

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append([])
        try:
            return call(self, *args, **kwargs)
        finally:
            running.pop()

    interpreter._patch_builtin, interpreter._patch_lang = replace_builtins, replace
    interpreter.GridExecutor.__call__ = launch
