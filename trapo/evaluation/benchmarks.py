"""`trapo eval` runs here on named benchmarks and suites, or on any files of those layouts; a table at the end.

    trapo eval CONFIG eval.suite=math data.dir=PATH                        # all six below
    trapo eval CONFIG eval.benchmarks=[aime24@8,math500,my.parquet@4] ...  # @k: samples a problem

run_dir/benchmarks/NAME.jsonl has every response, NAME.json the result (written last: the benchmark is finished),
run_dir/benchmarks.json all results. A finished benchmark is not done again. Until it is finished, NAME.answered.jsonl
has the problems that are answered, and the same command asks the others alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem
from trapo.data.sampling import derive_seed, load_eval_set
from trapo.engines.protocol import Engine
from trapo.errors import TrapoError
from trapo.evaluation.answers import Answers, refuse_other_settings
from trapo.evaluation.evaluate import EvalJob, EvalResult, evaluate
from trapo.models.loading import find_weights
from trapo.rewards.scoring import FailureNotes, NoRewards
from trapo.runs.ranks import Scorer, joined
from trapo.runs.run_dir import refuse_unwritable
from trapo.runs.run_lock import RunLock
from trapo.tools.files import write_json

TEMPERATURE = 0.6  # the paper's, on every benchmark


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Holds a problem set and how often each problem is asked: once gives pass@1, more often avg@k and pass@k."""

    name: str
    title: str
    file: Path
    samples: int


# name: title, file in data.dir, samples a problem (the paper's protocol)
KNOWN: dict[str, tuple[str, str, int]] = {
    "aime24": ("AIME 2024", "aime.parquet", 32),
    "aime25": ("AIME 2025", "aime25.parquet", 32),
    "amc": ("AMC", "amc.parquet", 32),
    "math500": ("MATH-500", "math.parquet", 1),
    "minerva": ("Minerva Math", "minerva.parquet", 1),
    "olympiad": ("OlympiadBench", "olympiad_bench.parquet", 1),
}
SUITES: dict[str, tuple[str, ...]] = {"math": tuple(KNOWN)}


def chosen(job: EvalJob) -> list[Benchmark]:
    """Returns the benchmarks that eval.suite or eval.benchmarks names. Raises TrapoError for what is not there."""
    suite, listed = job.eval.suite, job.eval.benchmarks
    if suite and listed:
        raise TrapoError("eval.suite and eval.benchmarks: give one of them")
    if suite and suite not in SUITES:
        raise TrapoError(f"eval.suite: got {suite!r}; accepted: {', '.join(SUITES)}")
    found = [_find(entry, job) for entry in (SUITES[suite] if suite else listed or ())]
    names = [b.name for b in found]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise TrapoError(f"eval.benchmarks: {repeated!r} is there twice")
    return found


def evaluate_benchmarks(job: EvalJob, log: Callable[[str], None]) -> dict[str, EvalResult]:
    """Evaluate model.path on the chosen benchmarks; results by name. Finished ones are read, not done again, nor are
    answered problems of one that was interrupted. Under torchrun all ranks call it together.

    Raises TrapoError, before the model is loaded, for a missing file or for results of other settings in run_dir.
    """
    with joined() as ranks:
        return _evaluate_benchmarks(dataclasses.replace(job, ranks=ranks), log)


def _evaluate_benchmarks(job: EvalJob, log: Callable[[str], None]) -> dict[str, EvalResult]:
    job.set_threads()
    temperature = TEMPERATURE if job.eval.temperature is None else job.eval.temperature
    job = dataclasses.replace(job, eval=dataclasses.replace(job.eval, temperature=temperature))
    benchmarks = chosen(job)
    if temperature == 0 and (several := next((b for b in benchmarks if b.samples > 1), None)):
        raise TrapoError(
            f"eval.temperature: got 0 with {several.samples} samples of {several.name}; all would be equal"
        )
    ranks = job.ranks
    ranks.once(lambda: refuse_unwritable(job.run_dir))
    weights = ranks.once(lambda: _weights_digest(job.model.path))
    settings = {b.name: _settings(b, job, weights) for b in benchmarks}
    found = ranks.once(lambda: {b.name: _finished(b, job, settings[b.name]) for b in benchmarks})
    for b in benchmarks:
        if (earlier := found[b.name]) is not None:
            log(f"{b.title}: {earlier}; finished earlier, not done again")
    missing = [b for b in benchmarks if found[b.name] is None]
    with ExitStack() as held:
        if missing:
            ranks.once(lambda: held.enter_context(RunLock(job.run_dir / "benchmarks", log)) and None)
        for b, result, answers in _run(missing, job, settings, log):
            _save(b, job, settings[b.name], result)
            answers.forget()
            found[b.name] = result
            log(f"{b.title}: {result}")
    results = {name: result for name, result in found.items() if result is not None}
    ranks.once(lambda: _write_summary(job, results, settings))
    return results


def _save(benchmark: Benchmark, job: EvalJob, settings: dict[str, Any], result: EvalResult) -> None:
    """Writes a benchmark's result."""
    record = {"benchmark": benchmark.name, "title": benchmark.title, "settings": settings}
    values = record | {"result": dataclasses.asdict(result)}
    job.ranks.once(lambda: write_json(_result_path(benchmark, job), values))


def table(results: dict[str, EvalResult]) -> Table:
    """Returns one row a benchmark, and their average."""
    shown = Table(box=None, padding=(0, 1), header_style="bold")
    shown.add_column("benchmark")
    for column in ("problems", "metric", "accuracy", "95% interval", "pass@k", "95% interval", "ended", "tokens"):
        shown.add_column(column, justify="right")
    for name, r in results.items():
        title = KNOWN[name][0] if name in KNOWN else name
        metric = f"avg@{r.samples}" if r.samples > 1 else "pass@1"
        best = str(r.samples)
        several = (f"{r.pass_at[best]:.1%} @{best}", _percent(r.pass_at_interval[best])) if r.samples > 1 else ("", "")
        row = (metric, f"{r.accuracy:.1%}", _percent(r.interval), *several)
        shown.add_row(Text(title), str(r.problems), *row, f"{r.finished:.0%}", f"{r.mean_tokens:.0f}")
    if len(results) > 1:
        shown.add_row("average", "", "", f"{_average(results):.1%}")
    return shown


def _find(entry: str, job: EvalJob) -> Benchmark:
    name, mark, times = entry.rpartition("@")
    if not (mark and times.isdigit() and int(times) > 0):
        name, times = entry, ""
    if name in KNOWN:
        title, file, samples = KNOWN[name]
        if job.data.dir is None:
            raise TrapoError(f"data.dir: missing; give the folder that holds {file}")
        path = Path(job.data.dir) / file
    else:
        path, samples = Path(name), job.eval.samples
        title = name = path.stem
        if not path.suffix:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TrapoError(f"eval.benchmarks: got {entry!r}; accepted: {', '.join(KNOWN)} or a file{hint}")
    if not path.is_file():
        raise TrapoError(f"eval.benchmarks: {entry}: no file {path}")
    return Benchmark(name, title, path, int(times) if times else samples)


def _run(
    benchmarks: list[Benchmark], job: EvalJob, settings: dict[str, dict[str, Any]], log: Callable[[str], None]
) -> Iterator[tuple[Benchmark, EvalResult, Answers]]:
    """Yields (benchmark, result, the answers that it is of) as they finish; loads the model only if there is something
    to do."""
    if not benchmarks:
        return
    model, tokenizer = job.load()
    engine = job.make_engine(model, tokenizer)
    failures = FailureNotes(log)
    with job.pool() as pool:
        for i, b in enumerate(benchmarks):
            # Files may repeat a problem once per sample.
            columns = {} if b.name in KNOWN else job.data.columns
            data = dataclasses.replace(job.data, eval=str(b.file), dedup=True, columns=columns)
            problems = load_eval_set(data, tokenizer, log)
            assert problems is not None
            if i == 0:
                job.check_engine(engine, model, problems)
            answers = Answers(_answers_path(b, job), settings[b.name], job.ranks)
            earlier = f", {n} answered earlier" if (n := len(answers.load())) else ""
            log(f"{b.title}: {len(problems)} problems{earlier}, {b.samples} samples each, T = {job.eval.temperature:g}")
            result = _asked(b, job, problems, engine, pool, tokenizer, failures, answers)
            yield b, result, answers


def _asked(
    benchmark: Benchmark,
    job: EvalJob,
    problems: Sequence[EncodedProblem],
    engine: Engine,
    pool: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    failures: FailureNotes,
    answers: Answers,
) -> EvalResult:
    """Returns the result of a benchmark, its rows written. What fails for want of any reward is asked anew next
    time."""
    full = job.rollout.batch_size * job.ranks.world  # sequences of all engines together
    rows_path = _result_path(benchmark, job).with_suffix(".jsonl")
    try:
        return evaluate(
            problems,
            engine,
            pool,
            tokenizer,
            max_response_tokens=job.max_response_tokens,
            temperature=job.eval.temperature,
            samples=benchmark.samples,
            seed=derive_seed(job.seed, "benchmark", benchmark.name),
            rows_path=rows_path,
            ranks=job.ranks,
            failures=failures,
            answers=answers,
            at_once=max(1, full // benchmark.samples),
        )
    except NoRewards:
        answers.forget()
        raise


def _answers_path(benchmark: Benchmark, job: EvalJob) -> Path:
    return job.run_dir / "benchmarks" / f"{benchmark.name}.answered.jsonl"


def _result_path(benchmark: Benchmark, job: EvalJob) -> Path:
    return job.run_dir / "benchmarks" / f"{benchmark.name}.json"


def _settings(benchmark: Benchmark, job: EvalJob, weights: str | None) -> dict[str, Any]:
    """Returns everything that a result depends on, as far as a user chooses it."""
    return {
        "model": job.model.path,
        "weights": weights,
        "dtype": job.model.dtype,
        "engine": job.rollout.engine,
        "file": hashlib.sha256(benchmark.file.read_bytes()).hexdigest(),
        "columns": job.data.columns or None,
        "limit": job.data.eval_limit,
        "samples": benchmark.samples,
        "temperature": job.eval.temperature,
        "max_response_tokens": job.max_response_tokens,
        "max_prompt_tokens": job.data.max_prompt_tokens,
        "system_prompt": job.data.system_prompt,
        "prompt_suffix": job.data.prompt_suffix,
        "reward": job.reward.function,
        "reward_range": job.reward.range,
        "seed": job.seed,
    }


def _weights_digest(path: str) -> str | None:
    """Returns the SHA-256 of a local model's weights; None for a hub id, whose name must do."""
    source = find_weights(path)
    files = [source] if source.is_file() else sorted(p for e in ("safetensors", "bin") for p in source.glob(f"*.{e}"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest() if files else None


def _finished(benchmark: Benchmark, job: EvalJob, settings: dict[str, Any]) -> EvalResult | None:
    """Returns an earlier result with these settings. Raises TrapoError for one with others."""
    path = _result_path(benchmark, job)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    refuse_other_settings(path, record["settings"], settings)
    return EvalResult.from_dict(record["result"])


def _write_summary(job: EvalJob, results: dict[str, EvalResult], settings: dict[str, dict[str, Any]]) -> None:
    """Writes what is in the table, and what was asked."""
    entries = {name: dataclasses.asdict(r) | {"settings": settings[name]} for name, r in results.items()}
    summary = {"model": job.model.path, "benchmarks": entries, "average": _average(results)}
    write_json(job.run_dir / "benchmarks.json", summary)


def _average(results: dict[str, EvalResult]) -> float:
    return sum(r.accuracy for r in results.values()) / len(results)


def _percent(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
