"""Shared parts of the kernels' tests: which backends there are, inputs, tolerances, counters of FLOPs and of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import device
import interpreter
import torch
from simt import backend as cuda_on_cpu
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import trapo_kernels as tk
from trapo_kernels.backends.triton.rows import interpreted

# A new backend joins the whole suite by its name here; STREAMED ones bound their memory and leave work out.
DEVICE = device.name()
if interpreted():
    interpreter.quicken()
BACKENDS = device.BACKENDS[DEVICE] + ([*cuda_on_cpu.register(), "cpu"] if DEVICE == "cpu" else [])
STREAMED = [name for name in BACKENDS if name != "reference"]

# Largest error of a logprob and of a gradient, relative to the largest magnitude, against the float64 oracle on
# the same inputs. Low-precision logits are rounded by the GEMM, so their unit is that of a logit of size 4.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
DTYPES = list(TOLERANCE)

# Every term at once.
EVERYTHING = tk.Objective(
    clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.05, kl_coef=0.1, tis_cap=2.0, expert_coef=0.7
)
OBJECTIVES = {
    "everything": EVERYTHING,
    "trapo": tk.Objective.trapo(),
    "trapo+entropy": tk.Objective.trapo(entropy_coef=0.01),
    "grpo": tk.Objective.grpo(),
    "dapo+kl": tk.Objective.dapo(kl_coef=0.05),
    "sft": tk.Objective.sft(),
    "dft": tk.Objective.dft(),
    "luffy": tk.Objective.luffy(),
}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"with_bias": True},
    "temperature": {"temperature": 0.6},
    "scale": {"logit_scale": 0.125},
    "softcap": {"softcap": 2.0},
    "all": {"with_bias": True, "temperature": 1.7, "logit_scale": 1.5, "softcap": 3.0},
}


def slow(backend: str) -> bool:
    """Kernels are interpreted: some 10 ms a row."""
    return backend == "triton" and interpreted()


def affordable(backend: str, n: int, vocab: int = 0) -> int:
    """How many of n rows a test uses: all, or, where a row is slow, a few."""
    return min(n, 2 + n // 10 if vocab < 10_000 else 2) if slow(backend) else n


@dataclass
class Case:
    """Inputs of one call; `inputs` are the per-token tensors, `head` the head options but the bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    inputs: dict[str, Tensor | None]
    head: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
        return Case(hidden, weight, bias, self.targets, self.inputs, self.head)

    def params(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def requires_grad(self) -> Case:
        for t in self.params():
            t.requires_grad_()
        return self


def make_case(
    n: int,
    vocab: int,
    width: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    with_bias: bool = False,
    **head: Any,
) -> Case:
    """Random inputs with some of everything: ignored and masked tokens, expert tokens, A of both signs and 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(n, width), normal(vocab, width) / width**0.5
    bias = normal(vocab) if with_bias else None
    targets = torch.randint(0, vocab, (n,), generator=g)
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * head.get("logit_scale", 1.0)
    if head.get("softcap"):
        logits = head["softcap"] * (logits / head["softcap"]).tanh()
    logits = logits / head.get("temperature", 1.0)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    # Away from every boundary of EVERYTHING, where rounded logits would fall on the other side: log 0.8 = −0.22,
    # log 1.28 = 0.25, log 3 = 1.1.
    log_ratio = torch.tensor([-0.6, -0.5, -0.05, 0.0, 0.05, 0.5, 1.5])[torch.randint(0, 7, (n,), generator=g)]
    advantages = normal(n) * (torch.rand(n, generator=g) < 0.8)
    expert, mask = torch.rand(n, generator=g) < 0.3, torch.rand(n, generator=g) < 0.9
    targets = targets.masked_fill(torch.rand(n, generator=g) < 0.1, -100)
    inputs: dict[str, Tensor | None] = {
        "advantages": advantages,
        "old_logprobs": logprobs - log_ratio,
        "ref_logprobs": logprobs + 0.3 * normal(n),
        "rollout_logprobs": logprobs + 0.3 * normal(n),
        "expert_mask": expert,
        "mask": mask,
    }
    case = Case(hidden, weight, bias, targets, inputs, head)
    return case.to(dtype).requires_grad()


@dataclass
class Result:
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
    grads: list[Tensor]


def policy_loss(case: Case, objective: tk.Objective, backend: str, **options: Any) -> tk.PolicyLoss:
    arguments = {**case.inputs, **case.head, **options}
    return tk.linear_policy_loss(
        case.hidden, case.weight, case.targets, objective, bias=case.bias, backend=backend, **arguments
    )


def run(case: Case, objective: tk.Objective, backend: str, **options: Any) -> Result:
    """Loss, outputs and gradients of a fresh copy of the case."""
    case = case.to(case.hidden.dtype).requires_grad()
    out = policy_loss(case, objective, backend, **options)
    grads = torch.autograd.grad(out.loss, case.params())
    return Result(out.loss.detach(), out.logprobs, out.entropy, out.metrics, list(grads))


def oracle(case: Case, objective: tk.Objective, **options: Any) -> Result:
    return run(case.to(torch.float64), objective, "reference", **options)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 1e-3) -> None:
    """The largest error is at most `tolerance` of the largest magnitude (or of `floor`, if all is smaller)."""
    assert actual.shape == expected.shape, what
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max().item()
    allowed = tolerance * max(expected.abs().max().item(), floor)
    assert error <= allowed, f"{what}: error {error:.3g} above {allowed:.3g}"


def assert_same_result(actual: Result, expected: Result, dtype: torch.dtype, terms: int = 0) -> None:
    """terms: how many a sum has, the vocabulary's size; its rounding grows with the root of that. On CPUs whose
    products add one after the other (one row, AVX2) sums of 50,257 are beyond what is allowed for some thousands."""
    tolerance = TOLERANCE[dtype] * max(1.0, (terms / 10_000) ** 0.5)
    for name in ("loss", "logprobs", "entropy"):
        assert_close(getattr(actual, name), getattr(expected, name), tolerance, name, floor=1.0)
    for name, a, b in zip(("d_hidden", "d_weight", "d_bias"), actual.grads, expected.grads, strict=False):
        assert a.dtype == dtype
        assert_close(a, b, tolerance, name)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch.set_default_dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Counters ----------------------------------------------------------------------------------------------------


@contextmanager
def idle_kernels() -> Iterator[None]:
    """Interpreted kernels compute nothing: what is counted here does not depend on them, and sizes may be real."""
    if not interpreted():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    def run(*args: Any, **kwargs: Any) -> None:  # no Mock, which would keep every argument alive
        return None

    # What they leave unwritten is NaN and not by chance 0, which would be a row without a gradient.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(InterpretedFunction, "run", run):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class GemmCounter(TorchDispatchMode):
    """Multiply-adds of every matrix product, forward and backward; those inside our own operators by what they are
    asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm":
            self.macs += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name in ("addmm", "addmm_"):
            self.macs += args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif name in ("panel_stats", "triton_linear_stats"):  # hidden [n, D], weight [V, D]
            self.macs += args[0].numel() * args[1].shape[0]
        elif name == "panel_grad_":
            hidden, weight = args[0], args[1]
            in_d_weight, kept, _, d_hidden, d_weight = args[15:20]
            products = (d_hidden is not None) + (d_weight is not None)
            self.macs += products * hidden.numel() * weight.shape[0] + self.again(
                hidden, weight, kept, in_d_weight, d_weight
            )
        elif name == "panel_mass":
            self.macs += self.again(args[0], args[1], args[13], False, None)
        else:
            assert name not in ("bmm", "baddbmm", "linear", "mv", "dot"), f"count {name} too"
        return func(*args, **(kwargs or {}))

    def again(self, hidden: Any, weight: Any, kept: Any, in_d_weight: bool, d_weight: Any) -> int:
        """Of the logits that were kept nowhere."""
        itemsize = 4 if weight.dtype == torch.float32 else 2
        room = 0 if kept is None else kept.shape[1] * 64
        if in_d_weight:
            room += d_weight.shape[1] * d_weight.dtype.itemsize // (64 * itemsize) * 64
        return max(0, hidden.shape[0] - room) * weight.numel()


def gemms(fn: Callable[[], Any], case: Case) -> float:
    """How many full GEMMs [N, D] × [D, V] the call does."""
    with idle_kernels(), GemmCounter() as counter:
        fn()
    return counter.macs / (case.hidden.numel() * case.weight.shape[0])


def compiled_gemms(fn: Callable[[], Any], case: Case) -> float:
    """The same of a compiled call, inside which there can be no dispatch mode: by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        fn()
    macs = 0
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            macs += left[0] * left[1] * right[1]
    return macs / (case.hidden.numel() * case.weight.shape[0])


@dataclass
class Memory:
    peak: int  # bytes live at once beyond what was there before
    largest: int  # bytes of the largest allocation


def memory(fn: Callable[[], Any]) -> Memory:
    """What `fn` allocates, as the allocator sees it: temporaries inside operators included."""
    with idle_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = fn()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    del kept
    return Memory(peak, largest)
