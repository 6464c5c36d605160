"""Run folders for the tests of reports: what a training run writes, with numbers made up."""

import json

from trapo.config import merge_config, save_config
from trapo.tools.files import write_json

HOSTILE = "</script><script>window.hacked = true</script><img src=x onerror='window.hacked = true'> & {{ 7 * 7 }}"


def row(step, **more):
    """A line of metrics.jsonl as an old version wrote it: without histogram and step time by part."""
    base = {
        "step": step,
        "reward": 0.4,
        "reward_by_ratio": {"0": 0.2, "0.5": 0.9},
        "rollouts_by_ratio": {"0": 6, "0.5": 2},
        "guided": 0.25,
        "tokens_per_second": 100.0,
        "grad_norm": 1.0,
        "generated_length": 12.0,
        "entropy": 0.7,
        "trsft_clipped": 0.3,
        "expert_prob": 0.6,
    }
    return base | more


def full_row(step):
    """A line with everything that a report shows."""
    parts = {"generate": 5.0, "reward": 0.5, "logprobs": 1.0, "update": 7.0 + step % 3}
    seconds = {f"seconds_{part}": value for part, value in parts.items()} | {"seconds": 13.0 * step}
    seconds |= {"seconds_step": sum(parts.values()), "seconds_left": 99.0}
    histogram = [0] * 20
    for place, count in ((0, 20 - step), (1, 8), (5, 4), (19, 30 + step)):
        histogram[place] = count
    shown = {"finished": 0.5 + step / 50, "zero_advantage": 0.3, "lr": 1e-5, "peak_memory_gb": 3.5}
    return row(step, reward=0.3 + step / 40, expert_prob_histogram=histogram, **seconds, **shown)


def rollout(step, **more):
    base = {
        "step": step,
        "id": "test/1",
        "prompt": "Tom has 3 apples and buys 4 more. How many apples does he have?",
        "answer": "7",
        "prefix": "Tom has 3 + 4",
        "own": " = 7 apples.\n#### 7",
        "prefix_tokens": 6,
        "own_tokens": 9,
        "level": 1,
        "ratio": 0.5,
        "supervised": True,
        "finished": True,
        "reward": 1.0,
        "status": "ok",
        "advantage": 0.25,
    }
    return base | more


def write_run(path, rows, *, rollouts=(), accuracies=(), overrides=()):
    """accuracies: (step, accuracy) of each evaluation."""
    (path / "eval").mkdir(parents=True)
    save_config(merge_config({}, [f"run_dir={path}", *overrides]), path / "config.yaml")
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if rollouts:
        (path / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    for step, accuracy in accuracies:
        result = {"accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.07], "problems": 200}
        write_json(path / "eval" / f"step-{step:06d}.json", result)
    return path
