"""bench/trainer_vs_trl.py: what its ratios are made of."""

import pytest

from bench.trainer_vs_trl import GROUP, as_rollouts, compare
from trapo.rollouts import assign_advantages

ROWS = [
    {"prompt": [{"role": "user", "content": str(i)}], "prompt_ids": [1] * 10, "completion_ids": [[2] * n] * GROUP}
    for i, n in enumerate((20, 40))
]


def rounds(seconds, update, baseline):
    memory = {"update_mb": update, "baseline_mb": baseline, "peak_mb": update + baseline}
    return [{"seconds": s, "grad_norm": 1.5, **memory} for s in seconds]


def test_ratios_come_from_medians_of_each_processs_best_step():
    runs = {
        "trl": rounds([[9.0, 8.0], [4.0, 5.0], [6.0, 7.0]], 3000, 1000),
        "trapo": rounds([[3.0, 9.0], [2.0, 9.0], [9.0, 4.0]], 1500, 1000),
        "apart": rounds([[6.0, 9.0]], 2000, 1000),
    }
    found = compare(runs, ROWS)
    assert found["tokens"] == GROUP * (10 + 20 + 10 + 40)
    assert found["trl"]["tokens_per_second"] == pytest.approx(found["tokens"] / 6)
    assert found["update_speedup"] == pytest.approx(6 / 3)
    assert found["update_speedup_of_bests"] == pytest.approx(4 / 2)
    assert found["memory_ratio"] == 0.5
    assert found["peak_rss_ratio"] == 2500 / 4000
    assert (found["sharing_speedup"], found["sharing_memory_ratio"]) == (6 / 3, 0.75)


def test_every_rollout_has_a_gradient_so_that_none_can_be_left_out():
    rollouts = as_rollouts(ROWS)
    assign_advantages(rollouts, "all", True)
    assert len(rollouts) == 2 * GROUP
    assert all(r.advantage != 0 for r in rollouts)
