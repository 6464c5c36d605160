"""Against a real `vllm serve`: generation, weight sync through a folder, and what happens when the server dies."""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from engine_checks import EOS, learn, load, mismatch, requests, rollouts

from trapo.config import RolloutConfig
from trapo.engines.guard import AgreementGuard, plain_scorer
from trapo.engines.hf import HFEngine
from trapo.engines.vllm_server import VLLMServerEngine
from trapo.engines.vllm_sync import EXTENSION
from trapo.errors import TrapoError

ROUNDING = 2e-4  # nats; fp32 through two implementations


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ServerProcess:
    """`vllm serve`, started as docs/vllm.md says; log: where its output goes."""

    def __init__(self, model_path, port, log):
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *[str(Path(sys.executable).with_name("vllm")), "serve", str(model_path)],
            *["--host", "127.0.0.1", "--port", str(port), "--worker-extension-cls", EXTENSION],
            *["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"],
            *["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"],
            *["--kv-cache-memory-bytes", str(1 << 27)],
        ]
        self.log = log
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self):
        for _ in range(1200):
            assert self.process.poll() is None, Path(self.log).read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5):
                return self
            time.sleep(0.25)
        raise AssertionError(Path(self.log).read_text()[-3000:])

    def kill(self):
        """Server and engine process at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(vllm_model_path, tmp_path_factory):
    process = ServerProcess(vllm_model_path, free_port(), tmp_path_factory.mktemp("server") / "log")
    yield process.wait()
    process.kill()


@pytest.fixture(scope="module")
def learner(vllm_model_path):
    """Not the weights that the server was started with."""
    model = load(vllm_model_path)
    learn(model)
    return model


@pytest.fixture(scope="module")
def engine(server, learner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync") / "weights"
    return VLLMServerEngine(server.url, learner, eos_ids=[EOS], batch_size=8, sync="folder", folder=folder)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_server_generates_with_the_learners_weights_and_says_so(engine, learner, temperature):
    assert mismatch(engine, learner, temperature) < ROUNDING


def test_greedy_completions_are_those_of_transformers(engine, learner):
    expected = HFEngine(learner, eos_ids=[EOS], pad_id=EOS).generate(requests(), temperature=0.0, seed=0)
    got = engine.generate(requests(), temperature=0.0, seed=0)
    assert [(c.token_ids, c.finished) for c in got] == [(c.token_ids, c.finished) for c in expected]


def test_the_same_seed_samples_the_same_tokens(engine):
    first, again, other = (engine.generate(requests(), temperature=1.0, seed=s) for s in (1, 1, 2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert first != other


def test_after_a_sync_it_generates_with_the_new_weights(engine, learner):
    changed = copy.deepcopy(learner)
    learn(changed)
    mismatch(engine, learner)  # contexts are cached
    with pytest.raises(TrapoError, match="does not generate with the learner's weights"):
        AgreementGuard(RolloutConfig(engine="vllm_server"), "float32").check(
            engine, rollouts(), plain_scorer(changed, 1.0), seed=0
        )
    engine.sync(changed)
    assert mismatch(engine, changed) < ROUNDING
    engine.sync(learner)
    assert mismatch(engine, learner) < ROUNDING


def test_what_the_server_refuses_is_one_line(engine):
    with pytest.raises(TrapoError, match=r"^rollout\.server_url: http://.* answered 400: ") as error:
        engine.generate(requests(1, tokens=5000), temperature=1.0, seed=0)
    assert "\n" not in str(error.value)


def train(url, model_path, run_dir):
    command = [
        *[sys.executable, "-c", "from trapo.cli import main; main()", "train", "demo"],
        *[f"model.path={model_path}", f"run_dir={run_dir}", "rollout.engine=vllm_server", f"rollout.server_url={url}"],
        *["data.eval_limit=2", "train.steps=12", "train.prompts_per_step=2", "rollout.max_response_tokens=24"],
        *["train.threads=1", "checkpoint.every=1"],
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_server_stops_the_run_with_one_line_and_the_run_continues_with_a_new_server(
    vllm_model_path, server, engine, tmp_path
):
    run_dir = tmp_path / "run"
    run = train(server.url, vllm_model_path, run_dir)
    metrics = run_dir / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    server.kill()
    output, errors = run.communicate(timeout=600)
    assert run.returncode == 2, output + errors
    assert errors.startswith(f"trapo: rollout.server_url: the vLLM server at {server.url} does not answer"), errors
    assert len(errors.strip().splitlines()) == 1
    done = max(int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").iterdir())
    assert 1 <= done < 12

    other = ServerProcess(vllm_model_path, free_port(), tmp_path / "log")
    try:
        run = train(other.wait().url, vllm_model_path, run_dir)
        output, errors = run.communicate(timeout=600)
    finally:
        other.kill()
    assert run.returncode == 0, output + errors
    assert f"after step {done}" in output
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["engine_mismatch"] < ROUNDING for row in rows)
