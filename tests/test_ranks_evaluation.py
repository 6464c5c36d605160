"""Evaluations and benchmarks that ranks share, and that are interrupted: the numbers are those of one process."""

import json

import pytest
from rank_processes import run_ranks, start_ranks

from trapo.errors import TrapoError
from trapo.evaluation.answers import Answers


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The arguments of a benchmark of 6 problems, of which an engine takes 2 at once, 3 samples each."""
    rows = [{"prompt": f"What is {i} + {9 - i}?", "answer": "9", "trace": f"It is 9, {i}.\n#### 9"} for i in range(6)]
    file = tmp_path_factory.mktemp("benchmark") / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"eval.benchmarks=[{file}@3]", "eval.temperature=0.6", "rollout.batch_size=6"], file


@pytest.fixture(scope="module")
def whole(asked, tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    (out,) = run_ranks(1, "evaluated", tiny_model_path, run_dir, "", *asked[0])
    return run_dir, out


def found(run_dir):
    """What an evaluation leaves."""
    files = sorted(p for p in (run_dir / "benchmarks").iterdir() if p.suffix in (".json", ".jsonl"))
    return {p.name: p.read_text() for p in [*files, run_dir / "benchmarks.json"]}


def test_a_benchmark_of_two_ranks_is_that_of_one(whole, asked, tiny_model_path, tmp_path):
    first, second = run_ranks(2, "evaluated", tiny_model_path, tmp_path / "run", "", *asked[0])
    assert found(tmp_path / "run") == found(whole[0])
    assert sorted(found(whole[0])) == ["benchmarks.json", "mine.json", "mine.jsonl"]
    assert int(second.split()[-1]) == int(first.split()[-1]) == 2  # in blocks that are twice as large
    assert int(whole[1].split()[-1]) == 3


@pytest.mark.parametrize(("world", "dies", "kept"), [(1, 3, 4), pytest.param(2, 2, 4, marks=pytest.mark.slow)])
def test_a_killed_benchmark_goes_on_where_it_was(world, dies, kept, whole, asked, tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    done = start_ranks(world, "evaluated", tiny_model_path, run_dir, dies, *asked[0])
    assert all(rank.returncode for rank in done)
    part = run_dir / "benchmarks" / "mine.answered.jsonl"
    assert len(part.read_text().splitlines()) == 1 + kept
    assert not (run_dir / "benchmarks" / "mine.json").exists()
    out, *_ = run_ranks(world, "evaluated", tiny_model_path, run_dir, "", *asked[0])
    assert f"6 problems, {kept} answered earlier, 3 samples each" in out
    assert int(out.split()[-1]) == 1
    assert found(run_dir) == found(whole[0])


def test_an_evaluation_of_two_ranks_is_that_of_one(asked, tiny_model_path, tmp_path):
    """Held-out answers, traces and what the base model knew, each split."""
    overrides = [f"data.eval={asked[1]}", f"eval.prior={asked[1]}", "eval.samples=2", "eval.temperature=1"]
    for world in (1, 2):
        run_ranks(world, "evaluated", tiny_model_path, tmp_path / str(world), "", *overrides)
    one, two = (json.loads((tmp_path / str(world) / "eval.json").read_text()) for world in (1, 2))
    for key in ("trace_nll", "prior_nll"):
        assert two.pop(key) == pytest.approx(one.pop(key), rel=1e-6)
    assert one == two
    assert one["trace_tokens"] > 0
    texts = [(tmp_path / str(world) / "eval.jsonl").read_text() for world in (1, 2)]
    assert texts[0] == texts[1]


def row(text):
    return {"text": text, "reward": 1.0}


def test_half_a_line_of_answers_is_cut_off_and_its_problem_asked_again(tmp_path):
    answers = Answers(tmp_path / "x.answered.jsonl", {"seed": 0})
    assert answers.load() == {}
    answers.add({0: [row("a\nb")], 2: [row("\u2028")]})
    for half in (b'[1, [{"text"', b"[3, x]\n[4, []]\n"):
        before = answers.path.read_bytes()
        answers.path.write_bytes(before + half)
        assert answers.load() == {0: [row("a\nb")], 2: [row("\u2028")]}
        assert answers.path.read_bytes() == before
    answers.add({1: [row("c")]})
    assert sorted(answers.load()) == [0, 1, 2]
    with pytest.raises(TrapoError, match=r"x\.answered\.jsonl is of other settings \(seed\); choose another run_dir"):
        Answers(answers.path, {"seed": 1}).load()
    answers.forget()
    assert not answers.path.exists()


def test_a_full_disk_leaves_what_was_answered(tmp_path, monkeypatch):
    answers = Answers(tmp_path / "x.answered.jsonl", {"seed": 0})
    answers.load()
    answers.add({0: [row("a")]})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            answers.add({1: [row("b" * 100_000)]})
    assert answers.load() == {0: [row("a")]}
