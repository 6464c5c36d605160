"""This file logs to TensorBoard and Weights & Biases, where installed and asked for. metrics.jsonl is written whatever
is asked for."""

from __future__ import annotations

import importlib.util
import os
import secrets
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from trapo.errors import TrapoError, words_of
from trapo.evaluation.evaluate import EvalResult
from trapo.runs.run_dir import RunDir
from trapo.settings.groups import LogConfig
from trapo.settings.text import Tree, plain_tree
from trapo.tools.files import write_atomic

HISTOGRAM = "expert_prob_histogram"


class Logger(Protocol):
    """Takes the numbers of a step by name; a histogram is a list of counts over equal bins of [0, 1]."""

    def numbers(self, step: int, values: dict[str, float]) -> None: ...
    def histogram(self, step: int, name: str, counts: list[int]) -> None: ...
    def close(self) -> None: ...


class TensorBoardLogger:
    """Writes events into run_dir/tensorboard. A continued run writes on there; what it had after the checkpoint is
    purged."""

    def __init__(self, run_dir: RunDir, step: int, settings: Tree) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir.path / "tensorboard"), purge_step=step + 1 if step else None)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def histogram(self, step: int, name: str, counts: list[int]) -> None:
        edges = np.linspace(0, 1, len(counts) + 1)
        tokens, middles = np.asarray(counts), (edges[1:] + edges[:-1]) / 2
        self.writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=int(tokens.sum()),
            sum=float(tokens @ middles),
            sum_squares=float(tokens @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=tokens.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Logs to a W&B run; its id is kept in run_dir/wandb_id, so that a continued run is the same one there. Rows that
    it computes again are the ones that W&B has, which keeps the first."""

    def __init__(self, run_dir: RunDir, step: int, settings: Tree) -> None:
        import wandb

        id_file = run_dir.path / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "trapo"),
                id=id_file.read_text().strip(),
                resume="allow",
                name=run_dir.path.resolve().name,
                dir=str(run_dir.path),
                config=plain_tree(settings),
            )
        except wandb.Error as error:
            raise TrapoError(f"log.wandb: {words_of(error)}; {WANDB_HINT}") from error

    @staticmethod
    def check() -> None:
        """Raises TrapoError where W&B would ask for a key, which a run cannot answer."""
        import wandb

        if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
            return
        try:
            found = wandb.login(prompt=False)
        except TypeError:  # before 0.31 it has no such argument
            found = wandb.api.api_key is not None
        if not found:
            raise TrapoError(f"log.wandb: got true, but there is no key of W&B; {WANDB_HINT}")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def histogram(self, step: int, name: str, counts: list[int]) -> None:
        edges = np.linspace(0, 1, len(counts) + 1)
        self.run.log({name: self.wandb.Histogram(np_histogram=(np.asarray(counts), edges))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TrackioLogger:
    """A trackio run under the name of its folder, in trackio's own place on this machine (TRACKIO_DIR); `trackio show`
    shows it. A continued run goes on there; steps that are computed again are there twice."""

    def __init__(self, run_dir: RunDir, step: int, settings: Tree) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "trapo"),
            name=run_dir.path.resolve().name,
            resume="allow",
            config=plain_tree(settings),
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def histogram(self, step: int, name: str, counts: list[int]) -> None:
        """Logs the middle half of the distribution: trackio shows numbers alone."""
        total, seen, edges = sum(counts), 0, iter((0.25, 0.5, 0.75))
        quantiles, wanted = {}, next(edges)
        for place, count in enumerate(counts):
            seen += count
            while wanted is not None and seen >= wanted * total:
                quantiles[f"{name}/p{wanted * 100:.0f}"] = (place + 0.5) / len(counts)
                wanted = next(edges, None)  # type: ignore[assignment]
        self.trackio.log(quantiles, step=step)

    def close(self) -> None:
        self.trackio.finish()


WANDB_HINT = "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"

# log.NAME -> (module that must be there, logger)
LOGGERS: dict[str, tuple[str, type]] = {
    "tensorboard": ("tensorboard", TensorBoardLogger),
    "wandb": ("wandb", WandbLogger),
    "trackio": ("trackio", TrackioLogger),
}


def check_loggers(log: LogConfig) -> None:
    """Raises TrapoError for a logger that is asked for and cannot run here, before anything is computed."""
    for name in _wanted(log):
        module, _ = LOGGERS[name]
        if importlib.util.find_spec(module) is None:
            raise TrapoError(f"log.{name}: got true, but {module} is not installed (pip install {module})")
        if name == "wandb":
            WandbLogger.check()


class Loggers:
    """Holds all loggers that a run asked for; a context manager. step: the run is continued after it. settings: the
    run's configuration as nested dicts, to be shown. Of several ranks one has them enabled."""

    def __init__(self, log: LogConfig, run_dir: RunDir, step: int, settings: Tree, *, enabled: bool = True) -> None:
        wanted = _wanted(log) if enabled else []
        self.loggers: list[Logger] = [LOGGERS[name][1](run_dir, step, settings) for name in wanted]

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self.loggers:
            logger.close()

    def update(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics.jsonl."""
        for logger in self.loggers:
            logger.numbers(row["step"], flat_numbers(row))
            if row.get(HISTOGRAM):
                logger.histogram(row["step"], HISTOGRAM, row[HISTOGRAM])

    def evaluation(self, step: int, result: EvalResult) -> None:
        low, high = result.interval
        values = {"eval/accuracy": result.accuracy, "eval/low": low, "eval/high": high}
        names = ("trace_nll", "prior_nll", "prior_accuracy")
        values |= {f"eval/{name}": value for name in names if (value := getattr(result, name)) is not None}
        for logger in self.loggers:
            logger.numbers(step, values | {f"eval/pass@{k}": v for k, v in result.pass_at.items()})


def flat_numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a row by name, those of a mapping as name/key; words, lists and missing values are left
    out."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update(flat_numbers(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float)) and (prefix or name != "step"):
            flat[prefix + name] = float(value)
    return flat


def _wanted(log: LogConfig) -> list[str]:
    return [name for name in LOGGERS if getattr(log, name)]
