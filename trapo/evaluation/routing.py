"""`trapo route` decides by one gradient which problems go to SFT and which to RL (PRISM, arXiv 2601.07224).

The gradient of a trace's negative log-likelihood, at the weights as they are, is more or less concentrated on a few
of the matrices of a model. Problems whose gradient is concentrated go to RL, the others to SFT.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

import trapo_kernels as tk
from trapo.data.encode import EncodedProblem, Trace
from trapo.data.sampling import load_problem_set
from trapo.errors import TrapoError
from trapo.evaluation.evaluate import EvalJob
from trapo.models import agreement
from trapo.models.loading import head_of, load_model
from trapo.models.precision import compute_in
from trapo.tools.files import write_atomic


@dataclasses.dataclass(frozen=True)
class Routed:
    """Holds the problems with a trace, each with its concentration, the most concentrated first, and how many of them
    go to RL."""

    problems: list[tuple[EncodedProblem, float]]
    to_rl: int


def gini(values: torch.Tensor) -> float:
    """Returns the Gini coefficient of values [n] that are not negative: 0 where all are equal, 1 − 1/n where one has
    everything."""
    ordered, n = values.double().sort().values, len(values)
    total = float(ordered.sum())
    if total == 0:
        return 0.0
    places = torch.arange(1, n + 1, dtype=torch.float64)
    return float(2 * (places * ordered).sum() / (n * total) - (n + 1) / n)


def variation(values: torch.Tensor) -> float:
    """Returns the coefficient of variation of values [n]: their standard deviation over their mean."""
    wide = values.double()
    return float(wide.std(correction=0) / wide.mean()) if wide.any() else 0.0


def kurtosis(values: torch.Tensor) -> float:
    """Returns the fourth central moment of values [n] over the square of the second; 0 where all are equal."""
    centred = values.double() - values.double().mean()
    square = float(centred.square().mean())
    return float(centred.pow(4).mean()) / square**2 if square else 0.0


MEASURES: dict[str, Callable[[torch.Tensor], float]] = {"gini": gini, "cv": variation, "kurtosis": kurtosis}


def layer_matrices(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Returns the matrices of attention and MLP in numbered layers; every other parameter is frozen."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 2 and re.search(r"\.\d+\.", name) is not None)
        if parameter.requires_grad:
            chosen.append(parameter)
    if not chosen:
        raise TrapoError("model.path: the model has no matrices in numbered layers, over which gradients are compared")
    return chosen


def gradient_norms(
    model: PreTrainedModel,
    matrices: Sequence[torch.nn.Parameter],
    problem: EncodedProblem,
    trace: Trace,
    precision: str,
    scale: float = 1.0,
) -> torch.Tensor:
    """Returns the squared norm of the gradient of the trace's NLL, times `scale`, in each matrix [n]."""
    ids = torch.tensor([problem.prompt_ids + trace.token_ids], device=model.device)
    targets = ids[:, 1:].clone()
    targets[:, : len(problem.prompt_ids) - 1] = -100
    with compute_in(precision, model):
        hidden, head = head_of(model).with_hidden(agreement.hidden_states(model, ids[:, :-1]))
    loss = tk.linear_policy_loss(hidden, head.weight, targets, tk.Objective.sft(), **head.options).loss
    gradients = torch.autograd.grad(loss * scale, list(matrices), allow_unused=True)
    return torch.tensor([0.0 if g is None else float(g.double().square().sum()) for g in gradients])


def route(job: EvalJob, out: Path, *, by: str, rl_share: float, log: Callable[[str], None]) -> Routed:
    """Writes OUT/sft.jsonl and OUT/rl.jsonl, data.train's problems with a trace in our own layout, each with its
    concentration. rl_share: of them, the most concentrated, that go to RL."""
    if by not in MEASURES or not 0 <= rl_share <= 1:
        raise TrapoError(f"route: got by={by}, rl_share={rl_share}; accepted: {', '.join(MEASURES)} and a share of 1")
    if job.data.train is None:
        raise TrapoError("data.train: missing; `trapo route` sorts its problems")
    job.set_threads()
    model, tokenizer = load_model(job.model)
    data = dataclasses.replace(job.data, eval_limit=job.data.train_limit)
    problems = [p for p in load_problem_set(data, job.data.train, tokenizer, log) if p.traces]
    if not problems:
        raise TrapoError(f"data.train: {job.data.train} has no expert trace; `trapo route` needs some")
    matrices = layer_matrices(model)
    found = [(p, MEASURES[by](gradient_norms(model, matrices, p, p.traces[0], job.precision))) for p in problems]
    found.sort(key=lambda pair: -pair[1])
    routed = Routed(found, round(rl_share * len(found)))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("rl", found[: routed.to_rl]), ("sft", found[routed.to_rl :])):
        write_atomic(out / f"{name}.jsonl", "".join(_row(p, value) + "\n" for p, value in part))
    return routed


def _row(encoded: EncodedProblem, concentration: float) -> str:
    p = encoded.problem
    row = {"id": p.id, "source": p.source, "prompt": list(p.prompt), "answer": p.answer, "traces": list(p.traces)}
    return json.dumps({**row, "concentration": concentration}, ensure_ascii=False)
