"""Shared parts of the trainer's tests: the real tokenizer, and a tiny model with its vocabulary."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import signal
from pathlib import Path

import device
import pytest
import torch

# Two processes with two spinning OpenMP threads each crawl on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


# Tests that repeat what others check: for interpreted kernels, at some 10 ms a row, they are in the slow suite.
REPEATS = {
    "test_gradcheck_in_float64",
    "test_gradcheck_of_logprobs_and_entropy_in_float64",
    "test_any_choice_of_trained_parameters",
    "test_without_old_logprobs_the_ratio_is_one_with_its_gradient",
    "test_from_logits_forms_agree_with_the_oracle",
    "test_new_terms_agree_with_the_oracle_in_every_dtype",
    "test_new_terms_under_every_head_and_a_small_budget",
    "test_gradcheck",
    "test_opcheck_of_policy_loss",
    "test_opcheck_of_token_values",
    "test_logprobs_and_entropies_are_one_graph",
}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="test the kernels on tensors of this device: cpu (default), cuda")


def pytest_configure(config):
    # A background job of a shell may be started with SIGINT ignored, and so would be all that the tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = config.getoption("--device")
    reason = device.refuse(chosen)
    if reason is not None:
        raise pytest.UsageError(reason)
    device.activate(chosen)


def pytest_report_header(config):
    return f"kernels are tested on: {device.name()}"


def pytest_ignore_collect(collection_path):
    """The trainer's tests, and what only a CPU has, are not for other devices."""
    if device.name() != "cpu" and collection_path.suffix == ".py":
        return collection_path.name not in device.FILES or None
    return None


def pytest_collection_modifyitems(items):
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if interpreted and backend == "triton" and item.originalname in REPEATS:
            item.add_marker(pytest.mark.slow)


def made_once(factory, name: str, make) -> Path:
    """A folder that `make` fills, for all processes of this run of pytest: the first that wants it makes it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, unfinished = base / name, base / f"{name}.unfinished"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """SmolLM2's own, from the installed weights package, whose file takes seconds to read."""
    from transformers import AutoTokenizer

    from trapo.models.loading import SMOLLM2, find_weights

    def make(folder):
        weights = find_weights(SMOLLM2)
        AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name).save_pretrained(folder)

    return AutoTokenizer.from_pretrained(made_once(tmp_path_factory, "tokenizer", make))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory, tokenizer) -> Path:
    """A folder with a 2-layer Llama of random weights and SmolLM2's tokenizer: fast, and everything else real."""
    from tiny_models import tiny_llama

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}

    def make(folder):
        tiny_llama(tokenizer, **sizes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once(tmp_path_factory, "tiny-model", make)


@pytest.fixture
def file_size_limit():
    """A context manager under which no file grows past so many bytes: a write that really fails, as on a full disk."""

    @contextlib.contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
