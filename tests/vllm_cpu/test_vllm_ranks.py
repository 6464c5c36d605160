"""vLLM under torchrun: an engine a rank, and one server that all ranks ask. Runs are those of one process, killed or
not."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from killed_run import settings
from rank_processes import free_port
from safetensors.torch import load_file
from test_ranks import close
from test_resume import timeless
from test_vllm_server import ServerProcess

from trapo.config import save_config

ROUNDING = 2e-4  # nats; fp32 through two implementations
SMALL = [
    "rollout.seeding=request", "optim.eps=1e-3", "optim.lr=1e-3", "train.steps=5", "train.updates_per_step=1",
    "train.prompts_per_step=3", "eval.every=0", "data.eval_limit=2", "checkpoint.every=1", "checkpoint.keep=2",
    "rollout.max_response_tokens=12", "rollout.batch_size=8", "data.max_prompt_tokens=200",
    "eval.temperature=1.0",
]  # fmt: skip
IN_PROCESS = ["rollout.engine=vllm", "rollout.engine_args={kv_cache_memory_bytes: 67108864, block_size: 32}"]


def start(world, model, run_dir, *overrides):
    """The processes of a run, as torchrun starts them; one: without its environment."""
    save_config(settings(model, run_dir, *SMALL, *overrides), run_dir.parent / "c.yaml")
    port, running = free_port(), []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {name: str(value) for name, value in place.items()} if world > 1 else {}
        command = [sys.executable, "-m", "trapo.cli", "train", str(run_dir.parent / "c.yaml")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    return running


def ended(running):
    """(exit code, stdout, stderr) of each."""
    said = [process.communicate(timeout=180) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


def ran(world, model, run_dir, *overrides):
    run_dir.parent.mkdir(exist_ok=True)
    done = ended(start(world, model, run_dir, *overrides))
    assert all(code == 0 for code, *_ in done), done
    return done


def after_step(running, run_dir, step):
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert all(process.poll() is None for process in running), ended(running)
        time.sleep(0.02)


def same_runs(found, expected):
    rows, expected_rows = (
        [timeless(json.loads(x)) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (found, expected)
    )
    assert len(expected_rows) == 5
    for row, right in zip(rows, expected_rows, strict=True):
        # The guard asks each engine: other tokens than one engine's.
        assert max(row.pop("engine_mismatch"), right.pop("engine_mismatch")) < ROUNDING
        close(row, right)
    for name in ("step-000000.jsonl", "step-000005.jsonl"):
        assert (found / "eval" / name).read_text() == (expected / "eval" / name).read_text()
    weights, expected_weights = (load_file(d / "final" / "model.safetensors") for d in (found, expected))
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.fixture(scope="module")
def one_rank(vllm_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    ran(1, vllm_model_path, run_dir, *IN_PROCESS)
    return run_dir


def test_two_ranks_with_an_engine_each_are_one_rank_and_go_on_after_a_kill(one_rank, vllm_model_path, tmp_path):
    """A rank's engine lives and dies with it."""
    run_dir = tmp_path / "run"
    running = start(2, vllm_model_path, run_dir, *IN_PROCESS)
    after_step(running, run_dir, 2)
    running[1].kill()
    (code, _, errors), _ = ended(running)
    assert code == 2, errors
    assert errors.count("trapo: rank 0 of 2: another rank is gone (") == 1
    (_, said, _), (_, quiet, _) = ran(2, vllm_model_path, run_dir, *IN_PROCESS)
    assert "continuing" in said
    assert quiet.strip() == ""
    same_runs(run_dir, one_rank)


def test_two_ranks_feed_one_server_and_go_on_after_its_kill(one_rank, vllm_model_path, tmp_path):
    run_dir, server = tmp_path / "run", ServerProcess(vllm_model_path, free_port(), tmp_path / "log").wait()
    try:
        running = start(2, vllm_model_path, run_dir, "rollout.engine=vllm_server", f"rollout.server_url={server.url}")
        after_step(running, run_dir, 2)
    finally:
        server.kill()
    done = ended(running)
    assert {code for code, *_ in done} == {2}, done
    assert any("the vLLM server at" in errors for *_, errors in done)
    assert not any("Traceback" in errors for *_, errors in done), done
    server = ServerProcess(vllm_model_path, free_port(), tmp_path / "log").wait()
    try:
        (_, said, _), _ = ran(
            2, vllm_model_path, run_dir, "rollout.engine=vllm_server", f"rollout.server_url={server.url}"
        )
    finally:
        server.kill()
    assert "continuing" in said
    same_runs(run_dir, one_rank)
