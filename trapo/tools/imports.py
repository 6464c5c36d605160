"""This file imports functions of the user's, named as package.module:function or ./file.py:function."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from trapo.errors import TrapoError


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Returns the function that `name` stands for. Raises TrapoError, in a line that begins with `what`, for none."""
    place, _, function_name = name.rpartition(":")
    try:
        function = getattr(_module(place), function_name)
    except BaseException as error:  # a module may call sys.exit
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TrapoError(f"{what} {name!r} cannot be imported: {one_line(error)}") from error
    if not callable(function):
        raise TrapoError(f"{what} {name!r} is a {type(function).__name__}, not a function")
    return function


def source_file(name: str) -> Path | None:
    """Returns the file that such a function is written in, without importing it; None for a name that is no such
    function, and where there is no such file."""
    module, mark, _ = name.rpartition(":")
    if not mark:
        return None
    if module.endswith(".py") or "/" in module:
        path = Path(module)
        return path if path.is_file() else None
    loaded: Any = sys.modules.get(module)
    try:
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(module)
    except Exception:  # of a package on the way: importing it will name it
        spec = None
    spec = spec or PathFinder.find_spec(module, [os.getcwd()])
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def one_line(error: BaseException) -> str:
    """Returns an exception's type and words in one line, also where its own `__str__` fails."""
    try:
        words = str(error)
    except BaseException:
        words = "(its __str__ fails)"
    return " ".join(f"{type(error).__name__}: {words}".split())[:300]


def _module(place: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a module beside the config, also under the `trapo` command
    if not (place.endswith(".py") or os.sep in place):
        return importlib.import_module(place)
    path = Path(place if place.endswith(".py") else place + ".py").expanduser().resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for its own imports
    module_name = f"trapo_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a module up by its name
    spec.loader.exec_module(module)
    return module
