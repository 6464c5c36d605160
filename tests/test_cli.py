"""The commands as a user types them, each in a process of its own; one of them by the script that is installed."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

TRAPO = Path(sys.executable).with_name("trapo")
SMALL = [
    "data.eval_limit=4",
    "train.steps=2",
    "train.prompts_per_step=1",
    "rollout.max_response_tokens=24",
    "checkpoint.every=0",
]


def trapo(*arguments, expect=0, cwd=None):
    done = forked.run("trapo.cli:main", arguments, threads=2, cwd=cwd, timeout=600)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The demo on its real weights, cut short."""
    run_dir = tmp_path_factory.mktemp("cli") / "demo"
    done = trapo("train", "demo", f"run_dir={run_dir}", *SMALL)
    return run_dir, done.stdout


def test_the_demo_leaves_everything_it_promises(demo_run):
    run_dir, output = demo_run
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"eval_before", "eval_after", "steps", "seconds", "backend", "model"} <= summary.keys()
    assert (summary["steps"], summary["model"], summary["eval_problems"]) == (2, "smollm2-135m-instruct", 4)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out accuracy before" in output
    assert "95% interval" in output


def test_the_log_shows_rewards_by_guidance_level_clipping_entropy_speed_and_time_left(demo_run):
    _, output = demo_run
    header = next(line for line in output.splitlines() if line.startswith("step"))
    for column in ("reward@0", "reward@0.5", "reward@1", "TrSFT clipped", "entropy", "tokens/s", "left"):
        assert column in header


def test_transformers_loads_the_final_model_and_it_answers(demo_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = demo_run
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert "<|im_start|>" in tokenizer.chat_template
    assert getattr(model.config, "quantization_config", None) is None


def test_a_finished_run_is_kept_until_a_restart_is_asked_for(demo_run, tiny_model_path, tmp_path):
    arguments = ["train", "demo", f"model.path={tiny_model_path}", f"run_dir={tmp_path / 'run'}", *SMALL]
    trapo(*arguments)
    first = (tmp_path / "run" / "summary.json").read_text()
    assert "holds a finished run" in trapo(*arguments, expect=2).stderr
    # A mistake in the restart does not cost the old result.
    trapo(*arguments, "data.train=missing.jsonl", "--if-finished", "restart", expect=2)
    assert (tmp_path / "run" / "summary.json").read_text() == first
    trapo(*arguments, "train.steps=1", "--if-finished", "restart")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_mistake_leaves_the_run_folder_free_for_the_corrected_command(tiny_model_path, tmp_path):
    model = f"model.path={tiny_model_path}"
    trapo("train", "demo", model, "data.train=missing.jsonl", f"run_dir={tmp_path / 'run'}", expect=2)
    assert not (tmp_path / "run").exists()


def test_report_redraws_a_run(demo_run):
    run_dir, _ = demo_run
    (run_dir / "report.png").unlink()
    (run_dir / "report.html").unlink()
    done = subprocess.run([TRAPO, "report", run_dir], capture_output=True, text=True, check=True, timeout=600)
    assert str(run_dir / "report.html") in done.stdout
    assert (run_dir / "report.png").exists()
    assert "<article" in (run_dir / "report.html").read_text()  # sample rollouts


def test_report_compares_several_runs_on_one_page_here(demo_run, tmp_path):
    run_dir, _ = demo_run
    trapo("report", run_dir, run_dir, cwd=tmp_path)
    trapo("report", run_dir, "--out", tmp_path / "other.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.html", "report.html"]


def test_eval_scores_a_trained_model_with_several_samples(demo_run):
    run_dir, _ = demo_run
    out = run_dir.parent / "eval"
    done = trapo(
        "eval",
        "demo",
        f"model.path={run_dir / 'final'}",
        f"run_dir={out}",
        "data.eval_limit=2",
        "eval.samples=4",
        "eval.temperature=0.8",
    )
    assert "pass@4" in done.stdout
    assert json.loads((out / "eval.json").read_text())["pass_at"].keys() == {"1", "2", "4"}
    assert len((out / "eval.jsonl").read_text().splitlines()) == 8


def test_benchmarks_end_in_a_table_and_two_evaluations_can_be_compared(tiny_model_path, tmp_path):
    rows = [{"prompt": f"What is {i} + {4 - i}?", "answer": "4", "id": f"p{i}"} for i in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["eval", "demo", f"model.path={tiny_model_path}", f"eval.benchmarks=[{tmp_path / 'mine.jsonl'}@2]"]
    done = trapo(*arguments, f"run_dir={tmp_path / 'eval'}", "rollout.max_response_tokens=8")
    for word in ("benchmark", "avg@2", "95% interval", "mine"):
        assert word in done.stdout
    done = trapo("compare", tmp_path / "eval", tmp_path / "eval", "--out", tmp_path / "out.json")
    assert "sign flips" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["comparisons"][0]["difference"] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "nowhere.yaml"], "CONFIG: no file 'nowhere.yaml'; presets: "),
        (["train", "demo", "optim.learning_rate=1"], "optim.learning_rate: unknown key; did you mean optim."),
        (["train", "demo", "--optim.learning_rate=1"], "optim.learning_rate: unknown key; did you mean optim."),
        (["train", "demo", "model.path=TINY", "data.train=missing.jsonl"], "missing.jsonl: no such file"),
        (["train", "demo", "model.path=/no/such/model"], "model.path: cannot load '/no/such/model'"),
        (["train", "demo", "model.path=TINY", "reward.function=math2"], "reward"),
        (["train", "demo", "model.path=TINY", "model.freeze=nothing"], "model.freeze: 'nothing' matches none"),
        (["train", "smollm2-gsm8k", "model.path=TINY"], "data.train: missing"),
        (["eval", "smollm2-gsm8k", "model.path=TINY"], "data.eval: missing"),
        (
            ["eval", "demo", "model.path=TINY", "eval.suite=math"],
            "data.dir: missing; give the folder that holds aime.parquet",
        ),
        (["compare", "/no/a", "/no/b"], "compare: /no/a holds no evaluation"),
        (["report", "/no/such/run"], "holds no steps"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, named, tiny_model_path, tmp_path):
    arguments = [argument.replace("TINY", str(tiny_model_path)) for argument in arguments]
    done = trapo(*arguments, *(["run_dir=" + str(tmp_path / "r")] if arguments[0] == "train" else []), expect=2)
    assert named in done.stderr
    assert done.stderr.startswith("trapo: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_training_on_gsm8k_needs_nothing_but_the_two_paths(tmp_path, tiny_model_path):
    data = Path(__file__).parent.parent.parent / "shared" / "data"
    if not (data / "gsm8k-train.jsonl").exists():
        pytest.skip(f"GSM8K is not there: {data}")
    trapo(
        "train",
        "presets/smollm2-gsm8k.yaml",
        f"data.train={data / 'gsm8k-train.jsonl'}",
        f"data.eval={data / 'gsm8k-test.jsonl'}",
        f"model.path={tiny_model_path}",
        f"run_dir={tmp_path / 'run'}",
        "data.train_limit=20",
        *SMALL,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_problems"] == 4
