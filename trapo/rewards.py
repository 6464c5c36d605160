"""Rewards of finished texts, in worker processes that can be killed.

`math_reward` grades one text. `RewardPool` runs it, or any function of yours, in worker processes: an item
that hangs or takes its worker down scores 0 and is counted; the others, and the trainer, are not disturbed.

This module never imports torch, so a worker starts in the time that sympy takes to import.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import multiprocessing
import numbers
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from multiprocessing import connection
from types import TracebackType
from typing import Literal, cast

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from trapo.errors import TrapoError

# The one final-answer form: the tasks and the GSM8K reader write it, `final_answer` reads it.
ANSWER_MARK = "####"
FINAL_ANSWER = ANSWER_MARK + " {answer}"

Status = Literal["ok", "timeout", "crash", "error"]
RewardFn = Callable[[str, str], float]

# ------------------------------------------------------------------------------------------ grading one text

_PLAIN_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)")
_NUMBER_IN_TEXT = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
_WORD = re.compile(r"[A-Za-z]{2,}")
_NUMBER_RUN = re.compile(r"\d\s+\d")
_UNFINISHED = re.compile(r"\d\s*(?:[-+*/×÷·]|\\(?:times|cdot|div)\b)\s*(?!10\s*\^)\d")


def final_answer(text: str) -> str | None:
    r"""The final answer as written in `text`, or None when there is none.

    Two forms count: the rest of the line after `####` (or, if that is empty, the next line), and what is in
    \boxed{}. The last one in the text is the answer. A number anywhere else is not: a text that rambles past
    the right value, or never commits to one, has no answer.
    """
    mark, box = text.rfind(ANSWER_MARK), text.rfind("\\boxed")
    if mark < 0 and box < 0:
        return None
    if box > mark:
        return _balanced(text, box + len("\\boxed"))
    # A chat model's end mark may stand in the text when it was decoded with its special tokens.
    rest = re.split(r"<\|", text[mark + len(ANSWER_MARK) :], maxsplit=1)[0].strip()
    line = rest.split("\n", 1)[0].strip().strip("*").strip()
    return line or None


def _balanced(text: str, start: int) -> str | None:
    """The content of the braces that open at or after `start`; None when they never close."""
    match = re.compile(r"\s*\{").match(text, start)
    if match is None:
        return None
    depth = 1
    for i in range(match.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[match.end() : i].strip() or None
    return None


def math_reward(text: str, answer: str) -> float:
    r"""1.0 when the final answer of `text` (see `final_answer`) equals `answer`, else 0.0.

    Equality is math-verify's: 1/2 and 0.5, 1,234 and 1234, \frac and /, sets in any order. Words around one
    number are allowed ("24 apples"), several numbers are not. For a numeric `answer` the sum must have been
    done: "12 * 2" does not earn the reward of "24", "12 * 2 = 24" does.

    math-verify's own time limits are off, for they need SIGALRM and the main thread: call this through
    RewardPool where a text is not trusted.
    """
    given = final_answer(text)
    if given is None:
        return 0.0
    if (want := _number(answer)) is not None:
        given = given.rsplit("=", 1)[-1].strip()
        if (got := _number(given)) is not None and got == want:
            return 1.0
        if _UNFINISHED.search(given) and not _is_fraction_for(given, want):
            return 0.0
    return float(_math_verify_equal(given, answer))


def _number(text: str) -> Decimal | None:
    """The value of a plain decimal number ("-1,234.5", "$7"), None for anything else."""
    text = text.strip().strip("$").strip().rstrip(".")
    if not any(c.isdigit() for c in text) or not _PLAIN_NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def _is_fraction_for(given: str, want: Decimal) -> bool:
    """Whether `given` is a fraction "p/q" and stands for a value that is not whole."""
    return want != want.to_integral_value() and bool(re.fullmatch(r"-?\d+\s*/\s*\d+", given))


def _scientific_to_latex(text: str) -> str:
    # math-verify would read "3e6" as 3·e·6.
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def _math_verify_equal(given: str, answer: str) -> bool:
    from math_verify import parse, verify  # 0.3 s of sympy: only those who grade pay for it

    # It warns once that its timeouts are off. They are off on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(_as_latex(answer), parsing_timeout=None)
    found = parse(_readable(given), parsing_timeout=None)
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def _as_latex(text: str) -> str:
    if text.count("$") == 2 and not (text.startswith("$") and text.endswith("$")):
        return text  # words around one formula: math-verify finds it
    bare = text.replace("$", "").strip().rstrip(".")  # "$69$, $84$" is one set and not two answers
    return f"${_scientific_to_latex(bare)}$"


def _readable(given: str) -> str:
    """`given` in the form that math-verify reads as one value; empty when it holds several."""
    if "$" in given or "\\" in given:
        return _as_latex(given)
    if _WORD.search(given):  # "24 apples": as LaTeX this would be 24·a·p·p·l·e·s
        numbers = set(_NUMBER_IN_TEXT.findall(given))
        return numbers.pop() if len(numbers) == 1 else ""
    if _NUMBER_RUN.search(given):  # "25 24" would be read as 25 + 24
        return ""
    return _as_latex(given)


# ------------------------------------------------------------------------------------------------- the pool


@dataclass(frozen=True)
class Reward:
    """One item's outcome. `value` is 0.0 unless `status` is "ok"; `detail` is one line on what went wrong."""

    value: float
    status: Status
    detail: str = ""


class RewardPool:
    """Scores (text, answer) pairs in worker processes.

        with RewardPool("math", workers=2, timeout=5.0) as pool:
            rewards = pool.score([("... #### 24", "24")])      # [Reward(1.0, "ok")]
            pool.counts                                        # Counter({"ok": 1})

    fn: "math" (math_reward), or "package.module:function" of a function (text, answer) -> finite float.
    timeout: seconds an item may run; neither waiting in the queue nor the start of a worker counts.
    memory_gib: memory a worker may allocate beyond what it holds at its start (Linux only; None: no limit).

    Raises TrapoError for a function that cannot be imported, and RuntimeError when workers cannot start.

    Workers come from a fork server, not from a fork of this process, whose torch threads a fork would break.
    They import the script that started this process: keep its top level cheap and its main code behind
    `if __name__ == "__main__"`.
    """

    def __init__(
        self,
        fn: str = "math",
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory_gib: float | None = 4.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"RewardPool: workers must be at least 1; got {workers}")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"RewardPool: timeout must be a positive number of seconds; got {timeout}")
        _resolve(fn)  # a wrong name fails here, with its reason, and not in a worker
        self.fn, self.workers, self.timeout, self.memory_gib = fn, workers, float(timeout), memory_gib
        self.counts: Counter[str] = Counter()
        self._pool: ProcessPool | None = None

    def __enter__(self) -> RewardPool:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers at once. The pool starts new ones if it is used again."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Reward]:
        """A reward for each (text, answer), in the order given."""
        found = self._run(pairs)
        # None: lost when the pool broke down in a way that names no culprit. One at a time, there is one.
        rewards = [r or self._run([pair])[0] or _BREAKDOWN for r, pair in zip(found, pairs, strict=True)]
        self.counts.update(r.status for r in rewards)
        return rewards

    def _run(self, pairs: Sequence[tuple[str, str]]) -> list[Reward | None]:
        pool = self._pool or self._start()
        # Every item ends by its own limit. This one only guards against a pool that dies without saying so.
        deadline = time.monotonic() + 60 + (1 + len(pairs) / self.workers) * (self.timeout + 10)
        rewards: list[Reward | None] = []
        try:
            futures = [pool.schedule(_score, (self.fn, *pair), timeout=self.timeout) for pair in pairs]
        except RuntimeError:  # it broke between two calls, for instance when an idle worker was killed
            rewards = [None] * len(pairs)
        else:
            rewards = [self._outcome(future, deadline) for future in futures]
        if None in rewards:
            self.close()  # the next call starts a new one
        return rewards

    def _outcome(self, future: ProcessFuture[Reward], deadline: float) -> Reward | None:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except ProcessExpired as error:
            return Reward(0.0, "crash", f"the worker ended with exit code {error.exitcode}")
        except FutureTimeout:
            return Reward(0.0, "timeout", f"no result within {self.timeout:g} s") if future.done() else None
        except (RuntimeError, CancelledError):  # BrokenProcessPool is a RuntimeError
            return None

    def _start(self) -> ProcessPool:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            # The imports happen once, in the server: replacing a worker takes milliseconds.
            context.set_forkserver_preload(["__main__", __name__, "math_verify"])
        self._pool = ProcessPool(
            self.workers, initializer=_prepare_worker, initargs=(self.fn, self.memory_gib), context=context
        )
        try:
            self._pool.schedule(os.getpid).result(timeout=120)
        except Exception as error:
            self.close()
            raise RuntimeError(f"RewardPool: the workers did not start: {_one_line(error)}") from error
        return self._pool


_BREAKDOWN = Reward(0.0, "crash", "the worker pool broke down on this item")


def _resolve(fn: str) -> RewardFn:
    """The function that `fn` names. Raises TrapoError with the reason when there is none."""
    if fn == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise TrapoError("reward 'math' needs math-verify: pip install 'trapo-kernels[train]'")
        return math_reward
    module_name, _, name = fn.partition(":")
    if not module_name or not name:
        raise TrapoError(f"reward must be 'math' or 'package.module:function'; got {fn!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a module beside the config, also under the `trapo` command
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise TrapoError(f"reward {fn!r} cannot be imported: {_one_line(error)}") from error
    if not callable(function):
        raise TrapoError(f"reward {fn!r} is a {type(function).__name__}, not a function")
    return cast(RewardFn, function)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -------------------------------------------------------------------------------------- inside a worker


def _prepare_worker(fn: str, memory_gib: float | None) -> None:
    """Pays the imports before the worker takes its first item, then sets the memory limit."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if _resolve(fn) is math_reward:
        math_reward(FINAL_ANSWER.format(answer="1/2"), "0.5")
    if memory_gib is not None and sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as f:
            held = int(f.read().split()[0]) * resource.getpagesize()
        limit = held + int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _end_with_parent() -> None:
    # After a kill -9 of the trainer nobody else would end a worker that is busy.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _score(fn: str, text: str, answer: str) -> Reward:
    """One item. Only plain data leaves the worker: an exception of `fn` may not unpickle in the trainer."""
    try:
        value = _resolve(fn)(text, answer)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            return Reward(0.0, "error", f"{fn} must return a finite number; got {value!r:.100}")
        return Reward(float(value), "ok")
    except BaseException as error:  # SystemExit too: it must not end the worker
        return Reward(0.0, "error", _one_line(error))
