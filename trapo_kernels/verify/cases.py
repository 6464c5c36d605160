"""This file has the cases that a backend has to get right: values and gradients against `reference` in float64, on its
device.

They are few and hostile: every dtype, vocabularies that are ragged, of one column, and as long as each way through a
row kernel needs, heads with everything, losses that take one pass and two, tensors that are not contiguous, targets
that lead by 30 nats. The most telling come first, since a GPU whose kernels are compiled at first use may not have time
for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..objective import Objective

__all__ = ["CASES", "ENOUGH", "Case", "fault"]

# A backend that got this many right has proved itself, where time is short.
ENOUGH = 13

# Largest error of a value or gradient, relative to the largest magnitude; that of 16 bits is the rounding of a logit.
TOLERANCE = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 3e-2, "float16": 4e-3}

# Of values and gradients that are e^-nats themselves: the rounding of the logits that are far behind. What is computed
# as 1 − p is off by all of it.
FAR = {"float32": 1e-3, "bfloat16": 0.3, "float16": 3e-2}

_EVERYTHING = Objective(
    clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.05, kl_coef=0.1, tis_cap=2.0, expert_coef=0.7
)
OBJECTIVES = {
    "trapo": Objective.trapo(entropy_coef=0.01),
    "everything": _EVERYTHING,
    "sft": Objective.sft(),
    "gspo": Objective.gspo(clip_low=0.2, clip_high=0.28),  # its own bounds are narrower than bfloat16
    "sequence_mean": Objective.grpo(reduction="sequence_mean"),
}
_HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 3.0},
    "all": {"temperature": 1.7, "logit_scale": 1.5, "softcap": 3.0},  # and a bias
}


@dataclass(frozen=True)
class Case:
    """Describes one call. `call`: "loss" and "logprobs" of a linear head, "logits" is a loss of logits that exist."""

    call: str
    dtype: str
    rows: int
    vocab: int
    objective: str = "trapo"
    head: str = "plain"
    layout: str = "contiguous"  # or "strided"
    nats: float = 0.0  # by which each target leads
    width: int = 64

    @property
    def name(self) -> str:
        parts = [self.call, self.dtype, f"{self.rows}x{self.vocab}"]
        parts += [self.objective] * (self.call != "logprobs") + [self.head] * (self.head != "plain")
        parts += [self.layout] * (self.layout != "contiguous") + [f"{self.nats:g} nats"] * (self.nats > 0)
        return " ".join(parts)


def _cases() -> Iterator[Case]:
    yield Case("loss", "bfloat16", 7, 257)
    yield Case("loss", "bfloat16", 5, 50_257, "everything")
    yield Case("loss", "float32", 5, 50_257)
    yield Case("loss", "bfloat16", 5, 152_064)
    yield Case("logprobs", "bfloat16", 130, 515)
    yield Case("loss", "float16", 6, 32_000, "everything")
    yield Case("loss", "bfloat16", 9, 4_099, "sequence_mean")
    yield Case("loss", "float32", 7, 257, "sft", nats=30)
    yield Case("loss", "float32", 7, 257, "everything", "all")
    yield Case("logits", "float32", 6, 1_001, "everything", layout="strided")
    yield Case("loss", "bfloat16", 5, 128_257, "gspo")
    yield Case("loss", "float32", 1, 1)
    yield Case("loss", "bfloat16", 7, 515, "trapo", "all", "strided")
    yield Case("loss", "bfloat16", 5, 50_257, "sft", nats=30)
    yield Case("logprobs", "bfloat16", 7, 257, nats=30)
    yield Case("logprobs", "float16", 7, 257, nats=16)  # e^-30 is no fp16
    for dtype in ("bfloat16", "float16", "float32"):
        yield Case("logprobs", dtype, 7, 257, head="cap")
        yield Case("loss", dtype, 3, 2, "everything")
        yield Case("loss", dtype, 1, 4_099, "everything", layout="strided")
        yield Case("loss", dtype, 4, 32_768, "everything", "cap", width=16)
        yield Case("loss", dtype, 4, 262_144, width=16)
    yield Case("logits", "bfloat16", 6, 1_001, "trapo", "cap", "strided")
    yield Case("logits", "float16", 6, 50_257, "sequence_mean")
    yield Case("loss", "float32", 9, 257, "gspo", layout="strided")
    yield Case("loss", "float64", 5, 1_001, "everything", "all")
    yield Case("logprobs", "float32", 130, 515, layout="strided")
    yield Case("loss", "bfloat16", 3, 600_001, width=16)
    yield Case("loss", "float32", 3, 600_001, width=16)


CASES = tuple(_cases())


@dataclass
class _Inputs:
    first: Tensor  # hidden [N, D], or logits [N, V]
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor
    rows: dict[str, Tensor]
    head: dict[str, Any]

    def params(self) -> list[Tensor]:
        return [t for t in (self.first, self.weight, self.bias) if t is not None]

    def double(self) -> _Inputs:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().contiguous().requires_grad_()

        rows = {k: v.double() if v.is_floating_point() else v for k, v in self.rows.items()}
        first = wide(self.first)
        assert first is not None
        return replace(self, first=first, weight=wide(self.weight), bias=wide(self.bias), rows=rows)


def _strided(t: Tensor, case: Case) -> Tensor:
    """Returns the same values as every other row of a wider tensor, begun at its second column."""
    if case.layout == "contiguous" or t.dim() != 2:
        return t
    wide = t.new_zeros(2 * t.shape[0], t.shape[1] + 3)
    wide[::2, 1:-2] = t
    return wide[::2, 1:-2]


def _inputs(case: Case, device: torch.device) -> _Inputs:
    """Draws the inputs, the same on every device: on the CPU, in float64."""
    g = torch.Generator("cpu").manual_seed(0)
    n, d, v = case.rows, case.width, case.vocab

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")

    hidden, weight = normal(n, d), normal(v, d) / d**0.5
    targets = torch.randint(0, v, (n,), generator=g, device="cpu")
    if case.nats:
        # Along the target's row, so far that the next best logit is `nats` behind.
        towards = torch.nn.functional.normalize(weight[targets], dim=1)
        behind = (towards @ weight.T).scatter(1, targets[:, None], -torch.inf).amax(1)
        lead = (towards * weight[targets]).sum(1) - behind
        hidden = towards * (case.nats / lead)[:, None]
    logits = hidden @ weight.T
    dtype = getattr(torch, case.dtype)
    bias = normal(v) if case.head == "all" and case.call != "logits" else None
    head = _HEADS[case.head]
    logprobs = _head(logits if bias is None else logits + bias, head).log_softmax(-1)
    logprobs = logprobs.gather(1, targets[:, None]).squeeze(1)
    # Away from the bounds of the clip, where rounded logits would fall on the other side.
    log_ratio = torch.tensor([-0.6, -0.5, -0.05, 0.0, 0.05, 0.5, 1.5], dtype=torch.float64, device="cpu")
    log_ratio = log_ratio[torch.randint(0, 7, (n,), generator=g, device="cpu")]
    draws = torch.rand(3, n, generator=g, device="cpu")
    rows = {
        "advantages": normal(n) * (draws[0] < 0.8),
        "old_logprobs": logprobs - log_ratio,
        "ref_logprobs": logprobs + 0.3 * normal(n),
        "rollout_logprobs": logprobs + 0.3 * normal(n),
        "expert_mask": draws[1] < 0.3,
        "mask": (draws[2] < 0.9) | (torch.arange(n, device="cpu") == 0),
        "sequence_ids": torch.arange(n, device="cpu") // 4,
    }
    rows = {k: t.float().to(device) if t.is_floating_point() else t.to(device) for k, t in rows.items()}
    first = logits if case.call == "logits" else hidden

    def given(t: Tensor) -> Tensor:
        return _strided(t.to(dtype).to(device), case).requires_grad_()

    return _Inputs(
        given(first), None if case.call == "logits" else given(weight), None if bias is None else given(bias),
        targets.to(device), rows, head,
    )  # fmt: skip


def _head(logits: Tensor, head: dict[str, Any]) -> Tensor:
    logits = logits * head.get("logit_scale", 1.0)
    if cap := head.get("softcap"):
        logits = cap * (logits / cap).tanh()
    return logits / head.get("temperature", 1.0)


def _results(case: Case, x: _Inputs, backend: str) -> dict[str, Tensor]:
    """Returns values, and the gradients of the loss or of a fixed sum of log-probabilities and entropies."""
    options: dict[str, Any] = {**x.head, "backend": backend}
    if case.call == "logprobs":
        assert x.weight is not None
        with torch.no_grad():
            alone = functional.linear_logprobs(x.first, x.weight, x.targets, bias=x.bias, **options)
        out = functional.linear_logprobs(x.first, x.weight, x.targets, bias=x.bias, entropy=True, **options)
        assert out.entropy is not None
        u = torch.linspace(-1, 1, case.rows, device=x.first.device, dtype=out.logprobs.dtype)
        loss = (u * out.logprobs).sum() + (u.flip(0) * out.entropy).sum()
        values = {"logprobs": out.logprobs, "entropy": out.entropy, "logprobs under no_grad": alone.logprobs}
    else:
        objective, rows = OBJECTIVES[case.objective], _needed(case, x.rows)
        if x.weight is None:
            found = functional.policy_loss_from_logits(x.first, x.targets, objective, **rows, **options)
        else:
            found = functional.linear_policy_loss(
                x.first, x.weight, x.targets, objective, bias=x.bias, **rows, **options
            )
        loss = found.loss
        values = {"loss": loss, "logprobs": found.logprobs, "entropy": found.entropy}
    names = ["d_logits"] if x.weight is None else ["d_hidden", "d_weight", "d_bias"]
    return {**values, **dict(zip(names, torch.autograd.grad(loss, x.params()), strict=False))}


def _needed(case: Case, rows: dict[str, Tensor]) -> dict[str, Any]:
    """Returns those of the per-token tensors that the objective takes."""
    left_out = {"trapo": ("old_logprobs", "ref_logprobs", "rollout_logprobs"), "everything": ("sequence_ids",)}
    if case.objective == "sft":
        return {"mask": rows["mask"]}
    return {k: t for k, t in rows.items() if k not in left_out.get(case.objective, ())}


def fault(case: Case, backend: str, device: torch.device) -> str | None:
    """Returns what is wrong with the backend's results, in one line; None: nothing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        inputs = _inputs(case, device)
        found = _results(case, inputs, backend)
        expected = _results(case, inputs.double(), "reference")
    finally:
        torch.set_float32_matmul_precision(before)
    for name, right in expected.items():
        if (reason := _differs(case, name, found[name], right)) is not None:
            return reason
    return None


def _differs(case: Case, name: str, found: Tensor, right: Tensor) -> str | None:
    if found.shape != right.shape:
        return f"{name} is of shape {tuple(found.shape)}, not {tuple(right.shape)}"
    error, size = (found.detach().double() - right).abs(), right.detach().abs()
    if case.nats and name == "logprobs":
        worst, unit = torch.where(error > 0, error / size, 0 * error).max().item(), "each value"
    else:
        floor = 0.0 if case.nats else 1e-3 if name.startswith("d_") else 1.0
        worst, unit = error.max().item() / max(size.max().item(), floor, 1e-300), "the largest value"
    allowed = (FAR if case.nats else TOLERANCE)[case.dtype]
    if worst <= allowed:  # a NaN is not
        return None
    return f"{name} is off by {worst:.2g} of {unit}; {allowed:g} is allowed"
