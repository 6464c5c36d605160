"""Rewards are computed in worker processes that can be killed: `RewardPool`."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any

from trapo.rewards.functions import resolve
from trapo.rewards.worker import Bounds, Reward, end_family, is_stopped, resume_family, serve

Item = tuple[str, str] | tuple[str, str, Mapping[str, Any]]

_TICK = 0.25  # seconds between two looks at the workers
_START_LIMIT = 120.0  # seconds for a worker's imports
_FROM_OUTSIDE = (
    -signal.SIGKILL,
    -signal.SIGTERM,
)  # exit codes of a worker that something else ended: out of memory, say


class RewardPool:
    """Scores (text, answer) pairs, or (text, answer, row), in worker processes.

        with RewardPool("math", workers=2, timeout=5.0) as pool:
            rewards = pool.score([("... #### 24", "24")])      # [Reward(1.0, "ok")]
            pool.counts                                        # Counter({"ok": 1})

    fn: a name of rewards/functions.py: "math", "math_verify", "package.module:function", "./file.py:function".
    timeout: seconds an item may run; waiting in the queue, the start of a worker and time in which this machine or
        this process was suspended do not count.
    memory_gib: memory a worker may allocate beyond what it holds at its start (Linux only; None: no limit). A process
        that the function starts has a limit of its own.
    bounds: what the function returns, lowest and highest; rewards are scaled to 0..1, others are errors. None: any
        number, as it is.

    Raises TrapoError for a function that cannot be imported or called, and RuntimeError when workers cannot start.

    A worker that something else kills gives its item a second try. What a function starts ends with its worker; what it
    prints to standard output is dropped. Workers come from a fork server, not from a fork of this process, whose torch
    threads a fork would break. They import the script that started this process: keep its top level cheap and its main
    code behind `if __name__ == "__main__"`.
    """

    def __init__(
        self,
        fn: str = "math",
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory_gib: float | None = 4.0,
        bounds: Bounds | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"RewardPool: workers must be at least 1; got {workers}")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"RewardPool: timeout must be a positive number of seconds; got {timeout}")
        if bounds is not None and not (math.isfinite(bounds[0]) and math.isfinite(bounds[1]) and bounds[0] < bounds[1]):
            raise ValueError(f"RewardPool: bounds must be two finite numbers, the lower one first; got {bounds}")
        # A wrong name or signature fails here, with its reason, and not in a worker.
        self.wants_row = resolve(fn).wants_row
        self.fn, self.workers, self.timeout, self.memory_gib = fn, workers, float(timeout), memory_gib
        self.bounds = bounds
        self.counts: Counter[str] = Counter()
        self._crew: list[_Worker] = []

    def __enter__(self) -> RewardPool:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, and all that they started, at once. The pool starts new ones if it is used again."""
        crew, self._crew = self._crew, []
        for worker in crew:
            worker.end()

    def score(self, items: Sequence[Item]) -> list[Reward]:
        """Returns a reward for each (text, answer), in the order given."""
        if not items:
            return []
        try:
            self._start()
            rewards = _Round(self, self._crew, items).run()
        except BaseException:  # an interrupt as well: what the workers are at is of no use any more
            self.close()
            raise
        self.counts.update(r.status for r in rewards)
        return rewards

    def _start(self) -> None:
        if not self._crew:
            self._crew = [_Worker(self) for _ in range(self.workers)]
            try:
                waited = _Clock()
                while not all(worker.is_ready() for worker in self._crew):
                    connection.wait([w.pipe for w in self._crew if not w.ready], timeout=_TICK)
                    if waited.spent() > _START_LIMIT:
                        raise RuntimeError(f"RewardPool: the workers did not start within {_START_LIMIT:g} s")
            except BaseException:
                self.close()
                raise


class _Clock:
    """Counts seconds by the monotonic clock, looked at every tick: a longer gap is a suspended machine and hardly
    counts."""

    def __init__(self) -> None:
        self._last, self._spent = time.monotonic(), 0.0

    def spent(self) -> float:
        now = time.monotonic()
        self._spent += min(now - self._last, 4 * _TICK)
        self._last = now
        return self._spent


class _Worker:
    """Is a worker as the pool sees it: its process, the pipe to it, and what it is at."""

    def __init__(self, pool: RewardPool) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            # The imports happen once, in the server: replacing a worker takes milliseconds.
            context.set_forkserver_preload(["__main__", "trapo.rewards.worker", "trapo.rewards.algebra", "math_verify"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, pool.fn, pool.memory_gib, pool.bounds), daemon=True
        )
        self.process.start()
        theirs.close()
        self.ready = False
        self.item: int | None = None
        self.clock = _Clock()
        self.resumed = False  # once an item: a function may stop itself

    def is_ready(self) -> bool:
        """Returns whether the worker's imports are done. Raises RuntimeError for a worker that could not start."""
        if not self.ready and self.pipe.poll():
            try:
                word, reason = self.pipe.recv()
            except (EOFError, OSError):
                self.process.join(timeout=1)
                word, reason = "failed", f"a worker ended with exit code {self.process.exitcode}"
            if word != "ready":
                raise RuntimeError(f"RewardPool: the workers did not start: {reason}")
            self.ready = True
        return self.ready

    def begin(self, item: int, request: tuple[str, str, Mapping[str, Any]]) -> bool:
        """Hands the worker an item; returns False where it is gone."""
        try:
            self.pipe.send(request)
        except OSError:
            return False
        self.item, self.clock, self.resumed = item, _Clock(), False
        return True

    def result(self) -> Reward | None:
        """Returns what the worker answered; None while it works. Raises EOFError when it is gone."""
        if not self.pipe.poll():
            return None
        try:
            value, status, detail, rule = self.pipe.recv()
        except EOFError:
            raise
        except Exception as error:  # a torn message, from a function that wrote to any file descriptor
            raise EOFError from error
        return Reward(value, status, detail, rule)

    def end(self) -> None:
        """Ends the worker and all that it started."""
        if self.process.pid is not None:
            end_family(self.process.pid)
        self.process.join(timeout=10)
        with contextlib.suppress(OSError):
            self.pipe.close()


class _Round:
    """Is one call of `RewardPool.score`."""

    def __init__(self, pool: RewardPool, crew: list[_Worker], items: Sequence[Item]) -> None:
        self.pool, self.crew, self.items = pool, crew, items
        self.waiting = deque(range(len(items)))
        self.rewards: dict[int, Reward] = {}
        self.second_tries: set[int] = set()

    def run(self) -> list[Reward]:
        while len(self.rewards) < len(self.items):
            self._hand_out()
            connection.wait([worker.pipe for worker in self.crew], timeout=_TICK)
            for index, worker in enumerate(self.crew):
                self._look_at(index, worker)
        return [self.rewards[i] for i in range(len(self.items))]

    def _hand_out(self) -> None:
        for index, worker in enumerate(self.crew):
            if not worker.is_ready() and worker.clock.spent() > _START_LIMIT:
                raise RuntimeError(f"RewardPool: a worker did not start within {_START_LIMIT:g} s")
            if worker.item is None and self.waiting and worker.ready:
                text, answer, *row = self.items[self.waiting[0]]
                if worker.begin(self.waiting[0], (text, answer, row[0] if row else {})):
                    self.waiting.popleft()
                else:  # it was killed while it had nothing to do
                    self._replace(index)

    def _look_at(self, index: int, worker: _Worker) -> None:
        if worker.item is None:
            if worker.ready and worker.pipe.poll():  # nothing is due from it: it is gone
                self._replace(index)
            return
        try:
            reward = worker.result()
        except EOFError:
            self._crashed(index, worker)
            return
        if reward is not None:
            self.rewards[worker.item] = reward
            worker.item = None
        elif worker.clock.spent() > self.pool.timeout:
            self._timed_out(index, worker)

    def _timed_out(self, index: int, worker: _Worker) -> None:
        pid = worker.process.pid
        assert worker.item is not None
        if pid is not None and not worker.resumed and is_stopped(pid):  # by somebody: not the answer's fault
            worker.resumed, worker.clock = True, _Clock()
            resume_family(pid)
            return
        self.rewards[worker.item] = Reward(0.0, "timeout", f"no result within {self.pool.timeout:g} s")
        self._replace(index)

    def _crashed(self, index: int, worker: _Worker) -> None:
        item = worker.item
        assert item is not None
        worker.process.join(timeout=1)
        code = worker.process.exitcode
        self._replace(index)
        if code in _FROM_OUTSIDE and item not in self.second_tries:
            self.second_tries.add(item)
            self.waiting.appendleft(item)
            return
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        self.rewards[item] = Reward(0.0, "crash", f"the worker {how}")

    def _replace(self, index: int) -> None:
        self.crew[index].end()
        self.crew[index] = _Worker(self.pool)
