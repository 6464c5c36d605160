"""Vocabulary-parallel heads on 2 and 4 gloo ranks against the oracle of the whole head."""

from __future__ import annotations

import fcntl
import json
import os

import forked
import pytest
from kernel_cases import DEVICE
from rank_processes import free_port
from vocab_parallel_ranks import CHECKS

# Of one GPU there is one rank: its collectives are real ones, and nothing changes hands.
WORLDS = [2, 4] if DEVICE == "cpu" else [1]


def run(world: int) -> list[dict[str, str | None]]:
    port, ranks = free_port(), []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = place | {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
        ranks.append(forked.Command("vocab_parallel_ranks:main", [], environment=environment))
    reports = []
    for done in forked.run_together(ranks, timeout=600):
        lines = done.stdout.strip().splitlines()
        assert lines, done.stderr[-3000:]
        reports.append(json.loads(lines[-1]))
    return reports


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """What every rank reports: by check, None or a traceback. Workers of pytest that share the checks share the run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run(request.param)
    folder = tmp_path_factory.getbasetemp().parent  # of all workers
    with open(folder / f"vocab_parallel_{request.param}.json", "a+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        kept.seek(0)
        if not (text := kept.read()):
            text = json.dumps(run(request.param))
            kept.write(text)
    return json.loads(text)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_vocabulary_parallel(ranks, check):
    for rank, report in enumerate(ranks):
        assert check in report, f"rank {rank} stopped before: {[name for name, error in report.items() if error]}"
        assert report[check] is None, f"rank {rank}: {report[check]}"
