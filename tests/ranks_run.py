"""Run by the tests of several ranks, once a rank: main, with the arguments WHAT ARGS... and torchrun's environment."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console

from trapo.models import lora
from trapo.runs.ranks import Ranks, join


def update(model: str, out: str, cases: str) -> None:
    """Three optimizer steps on the rollouts of test_learner for each list of overrides in the JSON `cases`; the first
    rank saves weights and what was reported."""
    from trapo.runs.ranks import leave

    ranks = join()
    done = [_update(model, ranks, overrides) for overrides in json.loads(cases)]
    if ranks.first:
        torch.save(done, out)
    leave(ranks)


def _update(model: str, ranks: Ranks, overrides: list[str]) -> dict:
    from test_learner import rollouts

    import trapo_kernels as tk
    from trapo.config import merge_config
    from trapo.models.loading import load_trained
    from trapo.models.weights import full_weights
    from trapo.trainer import make_learner

    # Adam divides by |gradient|: without this eps an entry that is nothing but rounding would move by lr.
    config = merge_config({"optim": {"lr": 1e-3, "eps": 1e-3}, "model": {"path": model}}, overrides)
    loaded, _ = load_trained(
        config.model,
        ranks,
        config.train.precision,
        change=lambda whole: lora.attach(whole, config.lora, base=model, seed=0),
    )
    seen: set[str] = set()
    loaded.get_decoder().norm.register_forward_hook(lambda *args: seen.add(str(args[-1].dtype)))
    learner = make_learner(config, loaded, pad_id=2, ranks=ranks)
    reports = [learner.update(rollouts(), tk.Objective.trapo(entropy_coef=0.01), seed=s) for s in range(3)]
    weights = {name: value.clone() for name, value in full_weights(loaded)}
    own = sum(p.to_local().numel() if ranks.world > 1 else p.numel() for p in loaded.parameters())
    return {"weights": weights, "reports": [vars(r) for r in reports], "own": own, "dtypes": sorted(seen)}


def train(model: str, run_dir: str, *overrides: str) -> None:
    """A run of the trainer."""
    from killed_run import base

    from trapo import trainer
    from trapo.config import merge_config

    summary = trainer.train(merge_config(base(model, run_dir), overrides), console=Console(width=160))
    print(json.dumps(summary))


def trains(model: str, out: str, cases: str) -> None:
    """A run of the trainer in OUT/i for each list of overrides in the JSON `cases`, one after the other."""
    from trapo import trainer
    from trapo.runs import ranks

    trainer.write_report = lambda *_: None
    ranks.leave = lambda _: None  # a second process group of the same processes does not come about
    for i, overrides in enumerate(json.loads(cases)):
        train(model, str(Path(out) / str(i)), *overrides)


def evaluated(model: str, run_dir: str, dies: str, *overrides: str) -> None:
    """`trapo eval`; a process of rank 0 dies by SIGKILL in the `dies`-th call of its engine. "": nobody does."""
    from killed_run import base

    from trapo.cli import eval_job
    from trapo.config import merge_config
    from trapo.engines import hf
    from trapo.evaluation import benchmarks, evaluate

    generate, calls = hf.HFEngine.generate, []

    def call(*args, **kwargs):
        calls.append(None)
        if str(len(calls)) == dies and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*args, **kwargs)

    hf.HFEngine.generate = call
    job = eval_job(merge_config(base(model, run_dir), overrides))
    if job.eval.benchmarks:
        benchmarks.evaluate_benchmarks(job, log=print)
    else:
        evaluate.evaluate_model(job, log=print)
    print(len(calls))


def full(what: str, command: str, *arguments: str) -> None:
    """The command line, on a file system that is full from the first call on that writes `what` (answers: the second);
    a checkpoint has room again afterwards. "": it has room all the time."""
    from trapo import cli
    from trapo.engines import make
    from trapo.evaluation.answers import Answers
    from trapo.evaluation.evaluate import EvalResult
    from trapo.models import weight_file
    from trapo.report.rollout_log import RolloutLog
    from trapo.runs.run_dir import RunDir
    from trapo.runs.saving import Saver

    if "server" in " ".join(arguments):
        make._make_engine = FolderEngine
        FolderEngine.dies = os.environ.get("DIES", "")
        weight_file._Sink.write = FolderEngine.half_written
    owner, name = {
        "": (Saver, "prune"), "metrics": (RunDir, "log"), "rollouts": (RolloutLog, "note"), "answers": (Answers, "add"),
        "evaluation": (EvalResult, "save"), "checkpoint": (Saver, "save"), "final": (Saver, "write_final"),
        "weights": (FolderEngine, "sync"),
    }[what]  # fmt: skip
    function, ballast, calls = getattr(owner, name), Path(os.environ["BALLAST"]), []

    def call(*args, **kwargs):
        calls.append(None)
        if what and os.environ["RANK"] == "0" and len(calls) > (what == "answers"):
            _fill(ballast)
        if what in ("checkpoint", "weights", "final"):
            join().barrier()
        result = function(*args, **kwargs)
        if what == "checkpoint":
            join().barrier()
            ballast.unlink(missing_ok=True)
        return result

    setattr(owner, name, call)
    sys.argv = ["trapo", command, *arguments]
    cli.main()


def _fill(ballast: Path) -> None:
    """Leaves no byte of the file system that the file is on."""
    with ballast.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


class FolderEngine:
    """Stands for `vllm serve` with weight_sync=folder: engine hf on weights that come from the folder, and from there
    alone, once it is told that they are in it. dies: the first rank is killed in the sync of this number, when half of
    the weights are written, or just before the server is told of them."""

    dies = ""  # "written:3", "told:3"
    syncs = 0

    def __init__(self, rollout, model, tokenizer, max_tokens, precision, run_dir) -> None:
        from transformers import AutoModelForCausalLM

        from trapo.engines.hf import HFEngine
        from trapo.engines.vllm_sync import SharedFolder
        from trapo.models.loading import eos_ids

        self.folder = run_dir / ".tmp-server-weights"
        self.send = SharedFolder(self, self.folder)
        with torch.random.fork_rng():
            self.model = AutoModelForCausalLM.from_config(model.config).eval()
        ends = eos_ids(model, tokenizer)
        self.engine = HFEngine(self.model, eos_ids=ends, pad_id=tokenizer.pad_token_id, batch_size=rollout.batch_size)
        self.url, self.ranks = "http://stand-in", join()
        self.sync(model)

    def post(self, path, body=None):
        if path == "/collective_rpc" and FolderEngine.dies == f"told:{FolderEngine.syncs}":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"success": True}

    @staticmethod
    def half_written(self, data) -> None:
        """Stands for `_Sink.write`."""
        self._trying(lambda: self.file.write(data))
        if FolderEngine.dies == f"written:{FolderEngine.syncs}" and self.path is not None and self.file.tell() > 10**6:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def sync(self, model) -> None:
        from safetensors.torch import load_file

        FolderEngine.syncs += 1
        self.send(model)
        # The whole file: a reader of half of it would raise.
        self.model.load_state_dict(load_file(self.folder / "model.safetensors"), strict=False)
        self.ranks.barrier()
        self.engine.sync(self.model)

    def generate(self, requests, *, temperature, seed):
        return self.engine.generate(requests, temperature=temperature, seed=seed)

    def rest(self) -> None:
        pass


def stopped(model: str, run_dir: str, *overrides: str) -> None:
    """A run whose second rank gets a SIGTERM in the rollouts of step 2."""
    from trapo.modes import drawing
    from trapo.runs.stopping import Stopped

    collect, calls = drawing.collect, []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(*args, **kwargs)

    drawing.collect = call
    try:
        train(model, run_dir, *overrides)
    except Stopped as reason:
        print(reason)


def memory(tiny: str, model: str, out: str) -> None:
    """Loads a model over all ranks and writes it; into OUT-RANK.json go the times of "loaded" and "written", and
    (time, bytes) of this process's own memory beyond what a tiny model takes."""
    from trapo.models.loading import load_trained
    from trapo.models.weights import writer
    from trapo.runs.ranks import leave
    from trapo.settings.groups import ModelConfig
    from trapo.tools.memory import give_back

    ranks, seen, marks = join(), [], {}

    def load_and_write(path: str, folder: str) -> None:
        loaded, tokenizer = load_trained(ModelConfig(path=path), ranks, "float32")
        marks["loaded"] = time.monotonic()
        scratch = Path(f"{folder}-weights") if ranks.first else None
        write = writer(loaded, tokenizer, final=True, scratch=scratch)
        ranks.once(lambda: write(Path(folder)))
        marks["written"] = time.monotonic()

    load_and_write(tiny, f"{out}-tiny")
    gc.collect()
    give_back()
    before = _own_memory()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append((time.monotonic(), _own_memory() - before))

    watching = threading.Thread(target=watch)
    watching.start()
    load_and_write(model, out)
    done.set()
    watching.join()
    Path(f"{out}-{ranks.rank}.json").write_text(json.dumps({"marks": marks, "seen": seen}))
    leave(ranks)


def _own_memory() -> int:
    """Bytes that this process alone has: pages of files do not count, as the machine may take them back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> None:
    known = (update, train, trains, stopped, memory, evaluated, full)
    {function.__name__: function for function in known}[sys.argv[1]](*sys.argv[2:])
