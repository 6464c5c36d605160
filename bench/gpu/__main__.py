"""Everything that a GPU can tell, in nine minutes: correctness, ceilings, the peers' table, graphs, training.

    python -m bench.gpu                          # make gpu; on a machine without make, offline, with its own torch
    python -m bench.gpu --device cpu             # tiny shapes: does the command work?
    python -m bench.gpu --out "$OUT" --minutes 8 --only environment smoke ceilings
    python -m bench.gpu --continue               # the stages that are missing or did not end well

Writes DEVICE.json after every row, DEVICE.md and DEVICE.logs.tgz after every stage, DEVICE.png at the end. A stage is
a process with a limit; what fails is a line. Killed at any time, the run leaves the results up to then. The exit status
is 1 if a stage did not end well.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import page, picture
from bench.gpu.environment import device_name
from bench.gpu.results import Results, slug
from bench.gpu.running import ROOT, Running
from bench.gpu.stages import MINUTES, Stage, command, stages

__all__ = ["main"]

_PAUSE = 0.2
_LEAST = 3.0  # seconds in which a stage may say something
# Kept for the page, the plot and the table.
_RESERVE = 6.0


class Run:
    """The clock, the results and the folder of a run."""

    def __init__(self, results: Results, device: str, minutes: float, work: Path) -> None:
        self.results, self.device, self.work = results, device, work
        self.stretch = max(minutes / MINUTES, 1.0)
        self.end = time.monotonic() + 60 * minutes - _RESERVE

    def stages(self, group: Sequence[Stage], later: Sequence[Stage] = ()) -> None:
        """Runs stages side by side, notes their rows as they come, and ends those that are late. Half of what those
        that come `later` may take is kept for them."""
        kept = sum(self._limit(stage) for stage in later) / 2
        running: list[Running] = []
        try:
            for stage in group:
                if self.end - time.monotonic() < _LEAST:
                    self.results.note(stage.name, self._rows(stage), {"status": "left out", "why": "the time is over"})
                else:
                    running.append(self._start(stage, kept))
            left = list(running)
            while left:
                time.sleep(_PAUSE)
                for one in list(left):
                    if one.ended():
                        left.remove(one)
                        self._ended(one)
                    else:
                        self.results.note(one.name, self._path(one.name), {"status": "running", "limit": one.limit})
        finally:
            for one in running:
                if one.process.poll() is None:
                    one.end()
                    self._ended(one)

    def _limit(self, stage: Stage) -> float:
        return stage.limit[self.device == "cpu"] * self.stretch

    def _start(self, stage: Stage, kept: float) -> Running:
        left = self.end - time.monotonic()
        limit = min(self._limit(stage), left, max(left - kept, _LEAST))
        self._rows(stage).unlink(missing_ok=True)
        print(f"[{stage.name}]", flush=True)
        line = command(stage, self.device, str(self._rows(stage)))
        return Running(stage.name, line, limit, self._rows(stage).with_suffix(".log"))

    def _ended(self, one: Running) -> None:
        outcome = one.outcome()
        self.results.note(one.name, self._path(one.name), outcome)
        print(f"[{one.name}] {outcome['status']}, {outcome['seconds']} s {outcome.get('why', '')}", flush=True)
        self.publish()

    def _path(self, name: str) -> Path:
        return self.work / f"{slug(name)}.jsonl"

    def _rows(self, stage: Stage) -> Path:
        return self._path(stage.name)

    def publish(self) -> None:
        """Writes everything but the JSON, which is always there."""
        base = self.results.path
        base.with_suffix(".md").write_text(page.markdown(self.results))
        with tarfile.open(base.with_suffix(".logs.tgz"), "w:gz") as archive:
            for path in sorted(self.work.iterdir()):
                archive.add(path, path.name)


def groups(chosen: Sequence[Stage], device: str) -> list[list[Stage]]:
    """Returns neighbours that measure no time together, on a GPU, whose machine has the cores; everybody else alone."""
    if device == "cpu":
        return [[stage] for stage in chosen]
    found: list[list[Stage]] = []
    for beside, neighbours in itertools.groupby(chosen, lambda stage: stage.beside):
        together = list(neighbours)
        found += [together] if beside else [[stage] for stage in together]
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole run")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages whose name begins with one of these words")
    parser.add_argument("--continue", dest="keep", action="store_true", help="leave out the stages that are done")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here; --device cpu shows that the command works")
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0; got {options.minutes:g}")
    names = [stage.name for stage in stages(options.device)]
    for word in options.only or []:
        if not any(name.startswith(word) for name in names):
            parser.error(f"--only: no stage begins with {word!r}; there are {', '.join(names)}")
    return options


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _interrupted)
    card = device_name(options.device)
    results = Results(options.out / f"{slug(card)}.json", options.device, card, options.keep)
    chosen = [s for s in stages(options.device) if not options.only or s.name.startswith(tuple(options.only))]
    if options.keep:
        chosen = [s for s in chosen if not results.done(s.name)]
    with tempfile.TemporaryDirectory() as work:
        run = Run(results, options.device, options.minutes, Path(work))
        try:
            together = groups(chosen, options.device)
            for i, group in enumerate(together):
                run.stages(group, [stage for other in together[i + 1 :] for stage in other])
        except KeyboardInterrupt:
            print("interrupted: what was found is kept", flush=True)
        results.write()
        run.publish()
    why = picture.draw(results, results.path.with_suffix(".png"))
    print("\n" + page.summary(results) + f"\n\n{results.path}" + (f"\nno plot: {why}" if why else ""))
    ended = [results.data["stages"].get(stage.name, {}).get("status") for stage in chosen]
    return 0 if all(status == "done" for status in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
