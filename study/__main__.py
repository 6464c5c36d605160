"""The study, one command per part; a command that is run again goes on where it stopped.

    python -m study exact        part 1: Proposition 1 and void mass, exactly
    python -m study pretrain     the base models of both tasks
    python -m study sweep        part 2: every arm's settings, chosen on validation
    python -m study arms         part 2: every arm at its settings, 5 seeds, on the test problems
    python -m study ablations    part 3: variants of TRAPO, conditions
    python -m study smollm       part 4: SmolLM2-135M on word problems
    python -m study regimes      part 5: on which data it pays; one process, runs what is missing until it is stopped
    python -m study plot         tables and pictures of docs/study.md from what is in study/results/
    python -m study status       what is done, and what the rest will cost
    python -m study all          all of it, in this order

--smoke: a version of minutes, into runs/study-smoke. --workers N: processes, one core each (default: all cores).
--task chain: of sweep, arms and ablations that task alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

from study.settings import FULL, SMOKE

ROOT = Path(__file__).parents[1]
ORDER = ("exact", "pretrain", "sweep", "arms", "ablations", "smollm", "regimes", "plot")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    from study.jobs import Study

    folder = options.results or (ROOT / "runs/study-smoke" if options.smoke else Path(__file__).parent / "results")
    scratch = ROOT / "runs/study" if options.results is None and not options.smoke else folder / "scratch"
    study = Study(SMOKE if options.smoke else FULL, folder, scratch)
    for part in ORDER if options.part == "all" else (options.part,):
        _run(study, part, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*ORDER, "status", "all"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, results in runs/study-smoke")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one core each")
    parser.add_argument("--task", choices=FULL.tasks, help="of sweep, arms and ablations; default: both")
    parser.add_argument("--minutes", type=float, help="start no further run after this long")
    parser.add_argument("--results", type=Path, help="where the JSON files are")
    return parser


def _run(study, part: str, options: argparse.Namespace) -> None:
    from study import jobs, plots, regime_tables, regimes, smollm, summary

    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if part == "exact":
        exact(study)
    elif part == "pretrain":
        pretrain(study)
    elif part in jobs.PARTS:
        _in_processes(study, part, options.workers, deadline, options.task)
        if missing := jobs.missing_settings(study):
            print(f"{part}: sweeps not finished: {', '.join(missing)}")
    elif part == "smollm":
        smollm.run_all(study)
    elif part == "regimes":
        regimes.work_regimes(regimes.of_study(study), deadline)
        print(regime_tables.standing(regimes.of_study(study)), flush=True)
    elif part == "plot":
        plots.draw_all(study)
    if part not in ("plot", "regimes"):
        print(summary.status(study, part), flush=True)


def exact(study) -> None:
    """Runs part 1, whose pieces are rows."""
    import torch

    from study.exact import exact_jobs

    torch.set_num_threads(1)
    for name, work in exact_jobs(smoke=study.settings.name == "smoke").items():
        study.part("exact").run(name, {}, work)


def pretrain(study) -> None:
    """Makes both base models."""
    import torch

    from study.base import make_base
    from study.task import tasks

    torch.set_num_threads(1)
    for name in study.settings.tasks:
        make_base(study.settings, study.results, tasks()[name], study.part("pretrain"))


def _in_processes(study, part: str, workers: int, deadline: float | None, task: str | None) -> None:
    """Starts `workers` processes that share the part's jobs; each has a core, and torch one thread."""
    from study.jobs import work

    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(study, part, deadline, task)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{part}: a worker ended with exit codes {[p.exitcode for p in processes]}")


if __name__ == "__main__":
    sys.exit(main())
