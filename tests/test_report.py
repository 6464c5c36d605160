import json

import pytest

from trapo.errors import TrapoError
from trapo.files import write_json
from trapo.report import write_report


def row(step, **more):
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


def write_run(path, rows):
    (path / "eval").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_picture_and_the_numbers_behind_it_are_written(tmp_path):
    write_run(tmp_path, [row(1), row(2, reward_by_ratio={"0": 0.5}, rollouts_by_ratio={"0": 8}, entropy=None)])
    write_json(tmp_path / "eval" / "step-000000.json", {"accuracy": 0.25, "interval": [0.2, 0.3]})
    picture = write_report(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["reward_by_ratio"] == {"0": [0.2, 0.5], "0.5": [0.9, None]}
    assert data["series"]["entropy"] == [0.7, None]
    assert data["evaluations"][0]["accuracy"] == 0.25


def test_a_run_of_one_step_without_evaluation_can_be_drawn(tmp_path):
    write_run(tmp_path, [row(1, reward=None, trsft_clipped=None)])
    assert write_report(tmp_path).exists()


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(TrapoError, match="holds no steps"):
        write_report(tmp_path)
