"""`trapo eval` on benchmarks: what is chosen, the protocol of each, what is written, what is not done again."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from trapo.cli import eval_job
from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.evaluation.benchmarks import KNOWN, SUITES, chosen, evaluate_benchmarks, table
from trapo.evaluation.compare import compare
from trapo.evaluation.evaluate import EvalJob

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture
def data_dir():
    if not all((DATA / file).exists() for _, file, _ in KNOWN.values()):
        pytest.skip(f"the problem sets are not there: {DATA}")
    return DATA


def job(base, overrides):
    return eval_job(merge_config(base, overrides))


def settings(model, run_dir, *overrides):
    small = ["rollout.max_response_tokens=8", "rollout.batch_size=16", "data.eval_limit=2"]
    return job({"model": {"path": str(model)}, "run_dir": str(run_dir)}, [*small, *overrides])


def problems(path, count, answer="4"):
    rows = [{"prompt": f"What is {i} + {4 - i}?", "answer": answer, "id": f"p{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))  # repeated, as AIME's files repeat theirs
    return path


def test_the_math_suite_follows_the_papers_protocol(data_dir):
    config = job({}, ["eval.suite=math", f"data.dir={data_dir}"])
    assert {b.name: b.samples for b in chosen(config)} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
        "math500": 1,
        "minerva": 1,
        "olympiad": 1,
    }


def test_samples_of_a_benchmark_can_be_said_with_its_name_and_any_file_will_do(tmp_path):
    file = problems(tmp_path / "mine.jsonl", 2)
    (tmp_path / "aime.parquet").write_bytes(b"")
    config = job({}, [f"eval.benchmarks=[aime24@8,{file}@3]", f"data.dir={tmp_path}"])
    assert [(b.name, b.title, b.samples) for b in chosen(config)] == [("aime24", "AIME 2024", 8), ("mine", "mine", 3)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.suite=maths"], r"eval\.suite: got 'maths'; accepted: math"),
        (["eval.suite=math"], r"data\.dir: missing; give the folder that holds aime\.parquet"),
        (["eval.suite=math", "data.dir=/nowhere"], r"aime24: no file /nowhere/aime\.parquet"),
        (["eval.benchmarks=[aime2024]"], r"got 'aime2024'; accepted: aime24, .* or a file; did you mean aime2"),
        (["eval.suite=math", "eval.benchmarks=[amc]"], "give one of them"),
        (["eval.benchmarks=[pyproject.toml,pyproject.toml]"], "'pyproject' is there twice"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(overrides, message, monkeypatch):
    monkeypatch.setattr(EvalJob, "load", None)
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(TrapoError, match=message):
        evaluate_benchmarks(job({}, overrides), log=print)


def test_greedy_decoding_of_several_samples_is_refused(tmp_path):
    file = problems(tmp_path / "mine.jsonl", 2)
    with pytest.raises(TrapoError, match=r"eval\.temperature: got 0 with 2 samples of mine"):
        evaluate_benchmarks(job({}, [f"eval.benchmarks=[{file}@2]", "eval.temperature=0"]), log=print)


def test_every_benchmark_of_the_suite_runs_on_its_real_file(data_dir, tiny_model_path, tmp_path):
    lines = []
    config = settings(tiny_model_path, tmp_path / "run", "eval.suite=math", f"data.dir={data_dir}")
    results = evaluate_benchmarks(config, log=lines.append)
    assert list(results) == list(SUITES["math"])
    for name, result in results.items():
        assert (result.problems, result.samples) == (2, KNOWN[name][2])
        rows = [json.loads(r) for r in (tmp_path / "run" / "benchmarks" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 2 * KNOWN[name][2]
        assert len({row["id"] for row in rows}) == 2  # AIME's 32 copies of a problem are one problem
    assert "AIME 2024: 2 problems, 32 samples each, T = 0.6" in lines
    summary = json.loads((tmp_path / "run" / "benchmarks.json").read_text())
    assert summary["benchmarks"]["amc"]["pass_at"].keys() == {"1", "2", "4", "8", "16", "32"}
    assert summary["benchmarks"]["amc"]["settings"]["temperature"] == 0.6
    assert summary["average"] == sum(r.accuracy for r in results.values()) / 6
    console = Console(width=160, file=io.StringIO())
    console.print(table(results))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("AIME 2025", "avg@32", "OlympiadBench", "pass@1", "average"))


def test_a_finished_benchmark_is_not_done_again_and_others_are(tiny_model_path, tmp_path, monkeypatch):
    one, two = problems(tmp_path / "one.jsonl", 2), problems(tmp_path / "two.jsonl", 2)
    run_dir, lines = tmp_path / "run", []
    first = evaluate_benchmarks(settings(tiny_model_path, run_dir, f"eval.benchmarks=[{one}@2]"), log=lines.append)
    # A killed one: responses without a result.
    (run_dir / "benchmarks" / "two.jsonl").write_text("half")
    both = settings(tiny_model_path, run_dir, f"eval.benchmarks=[{one}@2,{two}@2]")
    lines.clear()
    second = evaluate_benchmarks(both, log=lines.append)
    assert "finished earlier, not done again" in lines[0]
    assert not any("one: 2 problems" in line for line in lines)
    assert second["one"] == first["one"]
    assert len((run_dir / "benchmarks" / "two.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(EvalJob, "load", None)  # nothing is left to do
    assert evaluate_benchmarks(both, log=lines.append) == second
    changed = settings(tiny_model_path, run_dir, f"eval.benchmarks=[{one}@2]", "eval.temperature=1", "seed=5")
    with pytest.raises(TrapoError, match=r"one\.json is of other settings \(seed, temperature\); choose another"):
        evaluate_benchmarks(changed, log=lines.append)


def test_other_weights_under_the_same_path_are_not_taken_for_evaluated(tiny_model_path, tmp_path):
    file, model = problems(tmp_path / "one.jsonl", 2), tmp_path / "model"
    shutil.copytree(tiny_model_path, model)
    config = settings(model, tmp_path / "run", f"eval.benchmarks=[{file}]")
    evaluate_benchmarks(config, log=print)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(TrapoError, match=r"other settings \(weights\)"):
        evaluate_benchmarks(config, log=print)


def test_two_evaluations_can_be_compared(tiny_model_path, tmp_path):
    file = problems(tmp_path / "mine.jsonl", 3)
    for seed in (1, 2):
        config = settings(tiny_model_path, tmp_path / str(seed), f"eval.benchmarks=[{file}@2]", f"seed={seed}")
        evaluate_benchmarks(config, log=print)
    (found,) = compare(tmp_path / "1", tmp_path / "2")
    assert (found.name, found.problems, found.p_value) == ("mine", 2, 1.0)
