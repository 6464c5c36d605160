"""A small training run for tests of whole runs; as a program, one that kills itself (SIGKILL) at a given point.

main, with the arguments MODEL RUN_DIR KILL_AT [key=value ...]. KILL_AT: none, step:N, save:N, log:N, eval:N, report:1
"""

import io
import os
import signal
import sys

from rich.console import Console


def base(model, run_dir):
    """A run of 6 steps with two optimizer steps each, checkpoints at 2, 4 and 6, evaluations at 0, 3 and 6."""
    return {
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "data": {
            "train": "task://word_problems?split=train&n=20&seed=1",
            "eval": "task://word_problems?split=test&n=4",
        },
        "rollout": {"max_response_tokens": 16, "batch_size": 8},
        "optim": {"lr": 1e-2, "schedule": "linear", "warmup_steps": 2},
        "objective": {"entropy_coef": 0.01},
        "train": {"steps": 6, "prompts_per_step": 2, "threads": 1, "updates_per_step": 2},
        "eval": {"every": 3},
        "checkpoint": {"every": 2, "keep": 1},
        "log": {"rollouts_every": 2, "rollouts": 3},
    }


def settings(model, run_dir, *overrides):
    from trapo.config import merge_config

    return merge_config(base(model, run_dir), overrides)


def train_here(config):
    """Run it in this process, whose number of threads is kept; returns what the console showed."""
    import torch

    from trapo import trainer

    console, threads = Console(width=300, file=io.StringIO()), torch.get_num_threads()
    try:
        trainer.train(config, console=console)
    finally:
        torch.set_num_threads(threads)
    return console.file.getvalue()


def main() -> None:
    model, run_dir, kill_at, *overrides = sys.argv[1:]
    kind, _, number = kill_at.partition(":")
    import torch

    from trapo import learner, trainer
    from trapo.evaluation import held_out
    from trapo.runs import run_dir as run_dir_module

    calls: dict[str, int] = {}

    def deadly(what, function, after=False):
        """`function`, but the process dies in its N-th call: before anything is done, or `after` all is."""

        def call(*args, **kwargs):
            calls[what] = calls.get(what, 0) + 1
            dies = what == kind and calls[what] == int(number)
            result = function(*args, **kwargs) if after or not dies else None
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    # In the middle of a step: gradients are there, the optimizer has not stepped.
    learner.Learner._step = deadly("step", learner.Learner._step)
    # In the middle of a save: weights are written, the optimizer's state is not.
    torch.save = deadly("save", torch.save)
    # Between a step's row in metrics.jsonl and its checkpoint.
    run_dir_module.RunDir.log = deadly("log", run_dir_module.RunDir.log, after=True)
    # Between a checkpoint and the evaluation that follows it, and at the very end.
    held_out.evaluate = deadly("eval", held_out.evaluate)
    trainer.write_report = deadly("report", trainer.write_report) if kind == "report" else lambda *_: None
    trainer.train(settings(model, run_dir, *overrides), console=Console(width=160))
