"""The command line is `trapo train|eval|route|grade|plan|compare|report|config|presets|doctor`. Imports wait until
a command needs them, so that --help and the reward workers, which import this module again, start fast."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trapo.errors import TrapoError
from trapo.tools.terminal import plain_keys, print_table, replace_what_cannot_be_shown

if TYPE_CHECKING:
    from trapo.config import Config
    from trapo.evaluation.evaluate import EvalJob
    from trapo.models.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which would eat [aime24,math500] in a help text
)
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file or the name of a preset")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes, such as train.steps=20")
]


# What the disk, its file system or its rights answer: nothing that a traceback would explain better.
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT),
    *(
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EBUSY,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ELOOP,
    ),
    *(errno.EMFILE, errno.ENFILE, errno.EXDEV),
)


class IfFinished(str, Enum):
    stop = "stop"
    restart = "restart"


class IfChanged(str, Enum):
    stop = "stop"
    proceed = "continue"


class GpuName(str, Enum):
    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


@app.command()
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    if_finished: Annotated[
        IfFinished,
        typer.Option(help="what to do when run_dir holds a finished run: stop, or delete it and restart"),
    ] = IfFinished.stop,
    if_changed: Annotated[
        IfChanged,
        typer.Option(help="what to do when data or reward code changed since the run began: stop, or continue with it"),
    ] = IfChanged.stop,
) -> None:
    """Train; an interrupted run in the same run_dir is continued, and with more train.steps so is a finished one."""
    from trapo.config import load_config

    settings = load_config(config, overrides or [])
    _quiet_transformers()
    from trapo import trainer
    from trapo.report.summary import summary_lines
    from trapo.runs.stopping import Stopped

    console = _console()
    try:
        summary = trainer.train(
            settings,
            console=console,
            restart_finished=if_finished is IfFinished.restart,
            accept_changed=if_changed is IfChanged.proceed,
        )
    except KeyboardInterrupt:  # while the run was not under way, or not any more
        print("trapo: interrupted; the same command goes on where the run in run_dir is", file=sys.stderr)
        raise typer.Exit(130) from None
    except Stopped as stopped:
        console.print(f"trapo: {stopped}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130 if stopped.number == signal.SIGINT else 0) from None
    if summary:  # the first rank's
        for line in summary_lines(Path(settings.run_dir), summary):
            console.print(line, markup=False, highlight=False)


@app.command(name="eval")
def evaluate(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Evaluate model.path on data.eval (run_dir/eval.json, each response in run_dir/eval.jsonl), or on benchmarks:
    eval.suite=math or eval.benchmarks=[aime24,math500], data.dir=PATH (run_dir/benchmarks.json, benchmarks/NAME.jsonl).
    """
    from trapo.config import load_config, settle

    settings = load_config(config, overrides or [])
    _quiet_transformers()
    console = _console()
    log = functools.partial(console.print, markup=False, highlight=False)
    job = eval_job(settle(settings, log))
    if settings.eval.suite or settings.eval.benchmarks:
        from trapo.evaluation import benchmarks

        results = benchmarks.evaluate_benchmarks(job, log=log)
        print_table(console, benchmarks.table(results))
        return
    from trapo.evaluation import evaluate as evaluation

    result = evaluation.evaluate_model(job, log=log)
    log(f"{settings.data.eval}: accuracy {result}")
    if settings.eval.samples > 1:
        console.print("  ".join(f"pass@{k} {value:.1%}" for k, value in result.pass_at.items()), highlight=False)


def eval_job(settings: Config) -> EvalJob:
    """Returns what an evaluation needs of a configuration."""
    from trapo.evaluation.evaluate import EvalJob

    return EvalJob(
        model=settings.model,
        data=settings.data,
        rollout=settings.rollout,
        reward=settings.reward,
        eval=settings.eval,
        precision=settings.train.precision,
        threads=settings.train.threads,
        seed=settings.seed,
        run_dir=Path(settings.run_dir),
    )


@app.command()
def route(
    config: ConfigArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the folder of rl.jsonl and sft.jsonl")] = Path("routed"),
    by: Annotated[str, typer.Option(help="how concentration is measured: gini, cv or kurtosis")] = "gini",
    rl_share: Annotated[float, typer.Option(help="of the problems, the most concentrated, that go to RL")] = 0.5,
) -> None:
    """Sort data.train into problems for SFT and for RL, by how concentrated each trace's gradient is (PRISM)."""
    from trapo.config import load_config, settle

    settings = load_config(config, overrides or [])
    _quiet_transformers()
    from trapo.evaluation import routing

    console = _console()
    log = functools.partial(console.print, markup=False, highlight=False)
    routed = routing.route(eval_job(settle(settings, log)), out, by=by, rl_share=rl_share, log=log)
    log(f"{routed.to_rl} problems in {out}/rl.jsonl, {len(routed.problems) - routed.to_rl} in {out}/sft.jsonl")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="a run folder, a folder of `trapo eval`, or a .jsonl")],
    second: Annotated[Path, typer.Argument(metavar="B", help="another one, over the same problems")],
    out: Annotated[Path | None, typer.Option(help="also write the numbers to this JSON file")] = None,
) -> None:
    """Test two evaluations, paired: B minus A, problem by problem."""
    from trapo.evaluation import compare as comparison
    from trapo.tools.files import write_json

    found = comparison.compare(first, second)
    print_table(_console(), comparison.table(found, str(first), str(second)))
    for line in comparison.knowledge(first, second):
        _console().print(line, highlight=False)
    if out is not None:
        write_json(out, comparison.as_json(found, str(first), str(second)))


@app.command()
def grade(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL: eval.jsonl, eval/step-N.jsonl, rollouts.jsonl, ...")
    ],
    text: Annotated[str | None, typer.Option(help="the column of answers; default: the first that is there")] = None,
    answer: Annotated[str | None, typer.Option(help="the column of golds; default: the first that is there")] = None,
    function: Annotated[str, typer.Option(help="as reward.function")] = "math",
    range: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="as reward.range, two numbers")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write each row with its grade to this JSONL file")] = None,
    show: Annotated[int, typer.Option(min=0, help="so many rows of each rule, right ones and wrong ones")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds for one answer")] = 10.0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Grade a file of answers, and show which rule decided how often."""
    from trapo.rewards import grading

    console = _console()
    graded = grading.grade_file(file, text, answer, function, bounds=range, timeout=timeout, workers=workers)
    console.print(grading.table(graded), highlight=False)
    for line in grading.lines(graded, show):
        console.print(line, markup=False, highlight=False)
    if out is not None:
        grading.write(graded, out)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="GPUs that share the model")] = 8,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="assume responses of this length instead of the limit")
    ] = None,
    gpu: Annotated[GpuName, typer.Option(help="what it is to run on")] = GpuName.h100,
    host: Annotated[float | None, typer.Option(min=0, help="GiB of the machine's own memory")] = None,
) -> None:
    """Print shapes, memory, FLOPs, whether it fits and how long it takes, by arithmetic: without GPU or weights."""
    from trapo.config import load_config

    settings = load_config(config, overrides or [])
    _quiet_transformers()
    from trapo.models.gpus import GPUS
    from trapo.models.plan import tables

    for table in tables(plan_of(settings, ranks, response_tokens), GPUS[gpu.value], host):
        print_table(_console(), table)


def plan_of(settings: Config, ranks: int, response_tokens: int | None = None) -> Plan:
    """Returns what a configuration needs. response_tokens: of every rollout, in place of the limit."""
    from trapo.distillation.how import teacher_of
    from trapo.models.plan import StepTokens, make_plan
    from trapo.modes import phases

    found = phases(settings, ranks)
    rollouts, together = max(
        (phase.prompts_per_step * phase.schedule.rollouts_per_prompt, phase.schedule.rollouts_per_prompt)
        for phase in found
    )
    step = StepTokens(
        rollouts,
        settings.data.max_prompt_tokens,
        response_tokens or settings.rollout.max_response_tokens,
        together,
    )
    more = (teacher_of(settings.model, found), settings.rollout, any(phase.needs_reference for phase in found))
    return make_plan(settings.model, settings.lora, settings.train, step, ranks, *more)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="where the page goes, and nothing into RUN; default: RUN/report.html, of several ./report.html"
        ),
    ] = None,
) -> None:
    """Make one HTML page on a run, finished or not (and draw its report.png), or on several, compared."""
    from trapo.report.write import write_comparison, write_report

    if out is None and len(runs) == 1:
        page = write_report(runs[0])
    else:
        page = write_comparison(runs, out or Path("report.html"))
    _console().print(str(page), markup=False, highlight=False, soft_wrap=True)


@app.command()
def config(
    word: Annotated[
        str | None, typer.Argument(metavar="[WORD]", help="only keys with this word in their name or description")
    ] = None,
) -> None:
    """Print every key of a configuration with its default, what it accepts and what it is; and the modes."""
    from trapo.settings.table import tables

    console = _console()
    for table in tables(word):
        console.print(table, highlight=False)
        console.print()


@app.command()
def presets() -> None:
    """Print the presets that are installed with the package, and what each is for."""
    from trapo.settings.table import presets_table

    _console().print(presets_table(), highlight=False)


@app.command()
def doctor() -> None:
    """Print versions, devices, compilers and backends with their reasons, and what would make training faster."""
    from trapo_kernels.environment import describe

    _console().print(describe(), markup=False, highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from trapo_kernels import __version__

        print(f"trapo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train with TRAPO: SFT on expert prefixes inside a trust region, RL on the model's own continuation."""


def main() -> None:
    """Runs the command line: errors of the user's are one line on stderr and exit code 2."""
    replace_what_cannot_be_shown()
    sys.argv[1:] = plain_keys(sys.argv[1:])
    # Progress bars would break the live display. Both are read when torch or transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except TrapoError as error:
        print(f"trapo: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"trapo: {error.filename or 'a file'} could not be read or written: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _console() -> Console:
    if os.environ.get("RANK", "0") != "0":  # of several ranks the first one shows
        return Console(quiet=True)
    # Logs and pipes have no width of their own; a step's line should not be folded at 80 columns there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _quiet_transformers() -> None:
    """Turns transformers' progress bars off, which would break the live display; its warnings stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":  # torchrun -m trapo.cli
    main()
