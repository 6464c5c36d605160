"""Part 1, exact: what each supervised term does at its optimum, with every string enumerated. No sampling anywhere.

`proposition`: one categorical expert. Proposition 1 says that TrSFT's minimiser keeps S = {c : p_E(c) > αλ} at p_E/λ,
λ = Σ_S p_E, and forgets the rest (`predicted` adds the case in which no S does that); SFT keeps p_E.

`void`: an expert that speaks in one of two styles, chosen per string. A learner that remembers only the last token (a
table) cannot tell which style it is in, so it mixes; the mass on strings that are valid in neither style is `void`.
A learner that remembers everything (a small transformer) is the control: it need not mix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trapo_kernels as tk
from study.model import new_model
from trapo_kernels.tokens import Tokens

DESCENT_STEPS = 4000
ALPHAS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0)
OBJECTIVES: dict[str, tk.Objective] = {
    "NLL": tk.Objective.sft(),
    "TrSFT 0.03": tk.Objective(expert="trsft", alpha=0.03, policy=None),
    "TrSFT 0.1": tk.Objective(expert="trsft", alpha=0.1, policy=None),
    "TrSFT 0.3": tk.Objective(expert="trsft", alpha=0.3, policy=None),
    "DFT": tk.Objective.dft(),
    "LUFFY": tk.Objective.luffy(policy=None),
}


def exact_jobs(*, smoke: bool = False) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns the pieces of part 1: what to call each and how to compute its rows."""
    shares = (0.5, 0.9) if smoke else (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    checkpoints = (50, 100) if smoke else (100, 300, 1000)
    seeds = (1, 2) if smoke else (1, 2, 3, 4, 5)
    steps = 300 if smoke else DESCENT_STEPS
    return {
        **{f"proposition/{name}": lambda name=name: {"rows": list(proposition(name, steps))} for name in EXPERTS},
        **{
            f"tables/{share:g}": lambda share=share: {"rows": list(void_of_tables(share, steps=steps))}
            for share in shares
        },
        **{
            f"transformers/seed={seed}": lambda seed=seed: {
                "rows": [{"seed": seed, **row} for row in void_of_transformers(0.7, seed, checkpoints)]
            }
            for seed in seeds
        },
    }


# Expected losses ---------------------------------------------------------------------------------------------


def expected_loss(logits: Tensor, objective: tk.Objective, expert: Tensor) -> Tensor:
    """Returns E over classes y ~ expert of the token loss, summed over contexts [C]; logits, expert [C, V], expert
    weighted by how often each context comes up. LUFFY's advantage is 1: every string of the expert is right."""
    logprobs = logits.log_softmax(-1).flatten()
    return (objective.losses(_tokens(logprobs))["expert"] * expert.flatten()).sum()


def _tokens(logprobs: Tensor) -> Tokens:
    """Returns the expert tokens with these log-probabilities [n]."""
    return Tokens(
        logprobs=logprobs,
        entropy=torch.zeros_like(logprobs),
        expert=torch.ones_like(logprobs, dtype=torch.bool),
        advantages=torch.ones_like(logprobs),
    )


def optimum(objective: tk.Objective, expert: Tensor, steps: int = DESCENT_STEPS) -> Tensor:
    """Returns π [C, V] in float64 after minimising the expected loss over free logits, from the uniform policy."""
    logits = torch.zeros_like(expert).requires_grad_()
    weighted = expert / expert.sum(-1, keepdim=True)  # how often a context comes up does not move its optimum
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        expected_loss(logits, objective, weighted).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)


# Proposition 1 -----------------------------------------------------------------------------------------------

EXPERTS: dict[str, np.ndarray] = {
    "long tail (Zipf, 50 classes)": 1 / np.arange(1, 51),
    "two modes (0.6, 0.3, ten of 0.01)": np.array([0.6, 0.3, *[0.01] * 10]),
    "slope (20 classes)": np.arange(20, 0, -1.0),
}


def predicted(expert: np.ndarray, alpha: float) -> np.ndarray:
    """Returns the minimiser over all policies, from the optimality conditions: with a multiplier μ a class has p_E/μ
    where that is at least α (it is inside the trust region), and 0 where p_E < αμ.

    Mostly Σ π = 1 has a solution of that form: Proposition 1's, μ = λ. Where it has none, μ lies between the λ of two
    neighbouring sets, μ = p_E(c)/α for the class c between them, and c gets what is left over, at most α.
    """
    order = np.argsort(-expert, kind="stable")
    sorted_expert, kept = expert[order], len(expert)
    while kept > 1 and sorted_expert[kept - 1] <= alpha * sorted_expert[:kept].sum():
        kept -= 1
    mass = sorted_expert[:kept].sum()
    multiplier = mass
    if kept < len(expert) and sorted_expert[kept] > alpha * mass:
        multiplier = sorted_expert[kept] / alpha
    policy = np.zeros_like(expert)
    policy[order[:kept]] = sorted_expert[:kept] / multiplier
    if multiplier > mass:
        policy[order[kept]] = 1 - mass / multiplier
    return policy


def proposition(name: str, steps: int = DESCENT_STEPS) -> Iterator[dict[str, Any]]:
    """Yields, for TrSFT with every α and for SFT, predicted and found minimisers, and what is forgotten."""
    expert = EXPERTS[name] / EXPERTS[name].sum()
    objectives = {
        f"TrSFT {alpha:g}": (alpha, tk.Objective(expert="trsft", alpha=alpha, policy=None)) for alpha in ALPHAS
    }
    for label, (alpha, objective) in {"SFT": (0.0, tk.Objective.sft()), **objectives}.items():
        theory = predicted(expert, alpha)
        found = optimum(objective, torch.tensor(expert)[None], steps)[0].numpy()
        entropy = -(theory[theory > 0] * np.log(theory[theory > 0])).sum()
        yield {
            "expert": name,
            "objective": label,
            "alpha": alpha,
            "classes": len(expert),
            "classes_kept": int((theory > 0).sum()),
            "one_kept_in_part": bool(((theory > 0) & (theory < alpha * (1 - 1e-9))).any()),
            "expert_mass_forgotten": float(expert[theory == 0].sum()),
            "total_variation_found_vs_predicted": float(np.abs(found - theory).sum() / 2),
            "loss_of_found_minus_predicted": _loss_of(objective, expert, found) - _loss_of(objective, expert, theory),
            "total_variation_policy_vs_expert": float(np.abs(theory - expert).sum() / 2),
            "entropy_lost": float(-(expert * np.log(expert)).sum() - entropy),
        }


def _loss_of(objective: tk.Objective, expert: np.ndarray, policy: np.ndarray) -> float:
    """Returns E over the expert's classes of the token loss. Classes that the policy never says have a finite TrSFT
    loss."""
    seen = torch.tensor(expert > 0)
    logprobs = torch.tensor(policy).log()[seen]
    value = objective.losses(_tokens(logprobs))["expert"]
    return float((value * torch.tensor(expert)[seen]).sum())


# Void mass ---------------------------------------------------------------------------------------------------

SIZE, LENGTH = 4, 6  # alphabet, string length: 4096 strings
STYLES = {"A": (0, 1), "B": (2, 3)}  # moves (mod SIZE) from a token to the next
STRINGS = torch.tensor(list(itertools.product(range(SIZE), repeat=LENGTH)))  # [4096, 6]


def _in_style(name: str) -> Tensor:
    """Returns which strings are of a style, [4096] bool."""
    moves = (STRINGS[:, 1:] - STRINGS[:, :-1]) % SIZE
    return (moves[..., None] == torch.tensor(STYLES[name])).any(-1).all(-1)


def expert_strings(share: float) -> Tensor:
    """Returns p_E [4096]: style A for a `share` of the strings, B for the others, each uniform over its strings."""
    a, b = _in_style("A").double(), _in_style("B").double()
    return share * a / a.sum() + (1 - share) * b / b.sum()


def masses(strings: Tensor) -> dict[str, float]:
    """Returns where a distribution over strings [4096] puts its mass."""
    a, b = _in_style("A"), _in_style("B")
    return {
        "style_a": float(strings[a].sum()),
        "style_b": float(strings[b].sum()),
        "void": float(strings[~a & ~b].sum()),
    }


def _bigrams(strings: Tensor) -> Tensor:
    """Returns the expected number of times each token follows each [SIZE, SIZE]."""
    counts = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for i in range(LENGTH - 1):
        counts.index_put_((STRINGS[:, i], STRINGS[:, i + 1]), strings, accumulate=True)
    return counts


def void_of_tables(
    share: float, objectives: Mapping[str, tk.Objective] = OBJECTIVES, steps: int = DESCENT_STEPS
) -> Iterator[dict[str, Any]]:
    """Yields a table that remembers one token, at each objective's optimum. First tokens are the expert's own
    (uniform)."""
    expert = expert_strings(share)
    counts = _bigrams(expert)
    for name, objective in objectives.items():
        table = optimum(objective, counts, steps)
        yield {"share_of_style_a": share, "objective": name, **masses(_strings_of_table(table))}


def _strings_of_table(table: Tensor) -> Tensor:
    """Returns the distribution over strings [4096] of a first-order chain."""
    steps = table[STRINGS[:, :-1], STRINGS[:, 1:]]  # [4096, 5]
    return steps.prod(-1) / SIZE


def void_of_transformers(share: float, seed: int, checkpoints: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Trains a transformer of some 7,000 parameters on the exact expectation, and enumerates its 4096 strings."""
    expert = expert_strings(share)
    seen = expert > 0
    for name, objective in OBJECTIVES.items():
        model = new_model(seed, hidden=24, layers=1)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(1, max(checkpoints) + 1):
            logprobs = _string_logprobs(model, STRINGS[seen])
            losses = objective.losses(_tokens(logprobs.flatten()))["expert"].view_as(logprobs).sum(-1)
            optimizer.zero_grad()
            (losses * expert[seen].float()).sum().backward()
            optimizer.step()
            if step in checkpoints:
                with torch.no_grad():
                    strings = _string_logprobs(model, STRINGS).sum(-1).double().exp()
                yield {"share_of_style_a": share, "objective": name, "steps": step, **masses(strings)}


def _string_logprobs(model: torch.nn.Module, strings: Tensor) -> Tensor:
    """Returns log π of each token [n, LENGTH], after a start token; the softmax is over the alphabet alone."""
    start = torch.full((len(strings), 1), SIZE)
    hidden = model.get_decoder()(
        input_ids=torch.cat([start, strings[:, :-1]], dim=1), use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden)[..., :SIZE]
    return logits.log_softmax(-1).gather(-1, strings[..., None])[..., 0]
