"""Every public function, preset and backend, through what programs around them do: compilers, checkpoints, autocast,
defaults, hooks, threads. Value and gradients are those of the float64 oracle each time.

Each situation meets some calls by default, and all of them in the slow suite.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_cases import BACKENDS, assert_close, default_dtype
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import trapo_kernels as tk

B, T, D, V = 2, 5, 8, 37
# Presets whose terms read no more of a row than its log-probability and entropy.
NOT_OF_LOGPROBS = ("sed", "eaft", "asft", "lco")
PRESETS = [name for name, value in vars(tk.Objective).items() if isinstance(value, classmethod)]
OF_LOGPROBS = [name for name in PRESETS if name not in NOT_OF_LOGPROBS]


class Given:
    """Inputs of all calls, for [b, T] tokens; log-probabilities are those of `scale` times as large logits."""

    def __init__(self, b=B, scale=1.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = scale * torch.randn(b, T, D, generator=g)
        self.weight = torch.randn(V, D, generator=g) / D**0.5
        self.targets = torch.randint(0, V, (b, T), generator=g)
        logits = self.hidden.double() @ self.weight.double().T
        if scale > 1:  # a token that the model is sure of: margins of 10 to 60 nats
            self.targets = torch.where(torch.rand(b, T, generator=g) < 0.5, logits.argmax(-1), self.targets)
        logprobs = logits.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1).float()
        # Away from every bound of a clip, of GSPO's too.
        self.old = logprobs - torch.tensor([-0.7, -0.05, 0.06, 0.5, 0.9])
        self.inputs = {
            "advantages": torch.randn(b, T, generator=g),
            "old_logprobs": self.old,
            "expert_mask": torch.arange(T) < 2,
            "mask": torch.arange(T) != 3,
        }
        self.inputs |= {name: self.inputs[name].expand(b, T) for name in ("expert_mask", "mask")}
        self.ref = self.hidden.flip(-1), self.weight.flip(0)


def policy(preset):
    def call(given, hidden, weight, backend):
        ref = {"ref_hidden": given.ref[0].to(hidden), "ref_weight": given.ref[1].to(hidden)} if preset == "asft" else {}
        o = getattr(tk.Objective, preset)(entropy_coef=0.01)  # made where it is used
        return tk.linear_policy_loss(hidden, weight, given.targets, o, backend=backend, **given.inputs, **ref).loss

    return call


def policy_from_logits(preset):
    def call(given, hidden, weight, backend):
        o = getattr(tk.Objective, preset)(entropy_coef=0.01)
        logits = hidden @ weight.T
        return tk.policy_loss_from_logits(logits, given.targets, o, backend=backend, **given.inputs).loss

    return call


def policy_from_logprobs(preset):
    def call(given, hidden, weight, backend):
        found = tk.linear_logprobs(hidden, weight, given.targets, entropy=True, backend=backend)
        o = getattr(tk.Objective, preset)(entropy_coef=0.01)
        return tk.policy_loss_from_logprobs(found.logprobs, o, entropy=found.entropy, **given.inputs).loss

    return call


def as_module(given, hidden, weight, backend):
    loss = tk.TrapoLoss(tk.Objective.dapo(entropy_coef=0.01), backend=backend)
    return loss(hidden, weight, given.targets, **given.inputs).loss


def logprobs(given, hidden, weight, backend):
    out = tk.linear_logprobs(hidden, weight, given.targets, entropy=True, backend=backend)
    return (out.logprobs * given.inputs["advantages"].to(out.logprobs.dtype) + 0.1 * out.entropy).sum()


def logprobs_from_logits(given, hidden, weight, backend):
    out = tk.logprobs_from_logits(hidden @ weight.T, given.targets, entropy=True, backend=backend)
    return (out.logprobs + 0.1 * out.entropy).sum()


def divergence(given, hidden, weight, backend):
    ref = [t.to(hidden.dtype) for t in given.ref]
    return tk.linear_divergence(hidden, weight, *ref, mask=given.inputs["mask"], backend=backend).loss


def support(restrict):
    def call(given, hidden, weight, backend):
        ids = torch.stack([given.targets, (given.targets + 3) % V, torch.full_like(given.targets, -1)], -1)
        out = tk.linear_support_logprobs(
            hidden, weight, ids, mask=given.inputs["mask"], entropy=True, restrict=restrict, backend=backend
        )
        return out.logprobs.sum() + out.entropy.sum()

    return call


def topk_divergence(given, hidden, weight, backend):
    ids = torch.stack([given.targets, (given.targets + 3) % V], -1)
    logprobs = torch.where(torch.arange(2, device=ids.device) == 0, -0.5, -2.0).expand(ids.shape)
    return tk.linear_topk_divergence(
        hidden, weight, ids, logprobs, kind="mixed", mask=given.inputs["mask"], backend=backend
    ).loss


def low_rank(given, hidden, weight, backend):
    adapter = (given.weight[:3].to(hidden) / D, given.weight[:, :3].to(hidden), 0.5)
    out = tk.linear_logprobs(hidden, weight, given.targets, lora=adapter, backend=backend)
    o = tk.Objective.grpo(entropy_coef=0.01)
    policy = tk.linear_policy_loss(hidden, weight, given.targets, o, lora=adapter, backend=backend, **given.inputs)
    return policy.loss + (out.logprobs * given.inputs["advantages"].to(out.logprobs.dtype)).sum()


def statistics(given, hidden, weight, backend):
    names = ["top5_mass", "sum_sq", "mean_logit"]
    found = tk.linear_statistics(hidden, weight, given.targets, names, backend=backend)
    # A gradient to take, too: there is none of statistics.
    return sum(values.sum() for values in found.values()) + 0 * hidden.sum() + 0 * weight.sum()


CALLS = (
    {f"linear {name}": policy(name) for name in PRESETS}
    | {f"logits {name}": policy_from_logits(name) for name in PRESETS if name != "asft"}
    | {f"logprobs {name}": policy_from_logprobs(name) for name in OF_LOGPROBS}
    | {"TrapoLoss": as_module}
    | {"linear_logprobs": logprobs, "logprobs_from_logits": logprobs_from_logits}
    | {"linear_divergence": divergence, "linear_statistics": statistics}
    | {"linear_support_logprobs": support(False), "a sampling mask": support(True)}
    | {"linear_topk_divergence": topk_divergence, "an adapter": low_rank}
)
CORE = ("linear grpo", "linear gspo", "linear asft", "logits trapo", "linear_logprobs", "linear_divergence")
CORE += ("linear_support_logprobs", "linear_topk_divergence", "logprobs grpo")


# Situations: each runs `fn(hidden, weight)` and gives (value, gradients or None) -----------------------------------


def plainly(fn, *params):
    value = fn(*params)
    wanted = [p for p in params if p.requires_grad]
    return value, torch.autograd.grad(value, wanted)


def inside(*contexts):
    """Forward and backward inside of contexts, made anew."""

    def run(fn, *params):
        with contexts[0]() if contexts else nullcontext():
            return plainly(fn, *params)

    return run


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(**options):
    def run(fn, *params):
        torch._dynamo.reset()
        try:
            return plainly(torch.compile(fn, fullgraph=True, **options), *params)
        finally:
            torch._dynamo.reset()

    return run


def checkpointed(reentrant):
    def run(fn, *params):
        return _backward(checkpoint(fn, *params, use_reentrant=reentrant), params)

    return run


def _backward(value, params):
    for p in params:
        p.grad = None
    value.backward()
    return value, [p.grad for p in params if p.requires_grad]


def twice(fn, *params):
    value = fn(*params)
    wanted = [p for p in params if p.requires_grad]
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value, wanted), strict=True):
        assert torch.equal(a, b)
    return value, first


def without_gradient(mode):
    def run(fn, *params):
        with mode():
            return fn(*params), None

    return run


def frozen(which):
    def run(fn, *params):
        params[which].requires_grad_(False)
        value, (grad,) = plainly(fn, *params)
        return value, [None, grad] if which == 0 else [grad, None]

    return run


def scaled_in_fp16(fn, *params):
    narrow = [p.detach().half().requires_grad_() for p in params]
    value, grads = plainly(lambda *p: 2.0**8 * fn(*p), *narrow)
    return value / 2.0**8, [grad.double() / 2.0**8 for grad in grads]


def in_bf16(fn, *params):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = plainly(lambda hidden, weight: fn(hidden.bfloat16(), weight), *params)
    assert all(grad.dtype == p.dtype for grad, p in zip(grads, params, strict=True))
    return value, grads


# name: (how, tolerance, what of Given)
SITUATIONS = {
    "plainly": (plainly, 2e-5, {}),
    "compiled": (compiled(backend="eager"), 2e-5, {}),
    "compiled, dynamic": (compiled(backend="aot_eager", dynamic=True), 2e-5, {}),
    "checkpointed": (checkpointed(False), 2e-5, {}),
    "checkpointed, reentrant": (checkpointed(True), 2e-5, {}),
    "default dtype bfloat16": (inside(lambda: default_dtype(torch.bfloat16)), 2e-5, {}),
    "default dtype float64": (inside(lambda: default_dtype(torch.float64)), 2e-5, {}),
    "default device": (inside(lambda: torch.device("meta")), 2e-5, {}),
    "deterministic": (inside(deterministic), 2e-5, {}),
    "1 thread": (inside(lambda: threads(1)), 2e-5, {}),
    "3 threads": (inside(lambda: threads(3)), 2e-5, {}),
    "8 threads": (inside(lambda: threads(8)), 2e-5, {}),
    "hooks on saved tensors": (inside(lambda: saved_tensors_hooks(torch.clone, torch.clone)), 2e-5, {}),
    "a graph kept and run twice": (twice, 2e-5, {}),
    "no_grad": (without_gradient(torch.no_grad), 2e-5, {}),
    "inference_mode": (without_gradient(torch.inference_mode), 2e-5, {}),
    "frozen hidden states": (frozen(0), 2e-5, {}),
    "frozen head": (frozen(1), 2e-5, {}),
    "one sequence": (plainly, 2e-5, {"b": 1}),
    "no sequence": (plainly, 2e-5, {"b": 0}),
    "margins of 10 to 60 nats": (plainly, 1e-4, {"scale": 12.0}),
    "fp16 and a loss scale": (scaled_in_fp16, 1e-2, {}),
    "autocast": (in_bf16, 4e-2, {}),
}


def takes(call, backend):
    """Which backends a function has; kernels that are emulated are slow, and meet the chosen calls alone."""
    if call == "linear_divergence":
        return backend in ("torch", "reference")
    return call in CORE or backend in ("cpu", "torch", "reference")


def cases():
    for situation, call, backend in product(SITUATIONS, CALLS, BACKENDS):
        if takes(call, backend):
            core = call in CORE and backend == ("torch" if call == "linear_divergence" else "cpu")
            compiles = situation.startswith("compiled")  # test_compiled_objectives.py and test_compile.py have more
            default = core and (not compiles or call == "linear_divergence")
            marks = () if default else (pytest.mark.slow,)
            yield pytest.param(situation, call, backend, marks=marks, id=f"{situation}-{call}-{backend}")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("situation", "call", "backend"), list(cases()))
def test_value_and_gradients_are_the_oracles(situation, call, backend):
    how, tolerance, options = SITUATIONS[situation]
    given = Given(**options)
    params = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    wide = [p.detach().double().requires_grad_() for p in params]
    expected = CALLS[call](given, *wide, "reference")
    right = torch.autograd.grad(expected, wide)
    value, grads = how(lambda hidden, weight: CALLS[call](given, hidden, weight, backend), *params)
    assert_close(value, expected, tolerance, "value", floor=1.0)
    for grad, exact in zip(grads or (), right, strict=grads is not None):
        if grad is not None:
            assert_close(grad, exact, tolerance, "gradient", floor=1e-2)


def test_every_function_that_computes_is_called():
    calls = {"Divergence", "PolicyLoss", "SupportLogprobs", "TokenLogprobs"}  # what such a function returns
    functions = [getattr(tk, name) for name in tk.__all__ if inspect.isfunction(getattr(tk, name))]
    computing = {f.__name__ for f in functions if str(f.__annotations__.get("return", "")) in calls}
    assert len(computing) >= 7
    source = Path(__file__).read_text()
    assert [name for name in sorted(computing) if f"tk.{name}(" not in source] == []


@pytest.mark.parametrize("preset", NOT_OF_LOGPROBS)
def test_a_preset_that_reads_more_than_logprobs_is_refused_in_one_line(preset):
    with pytest.raises((TypeError, ValueError), match=r"^policy_loss_from_logprobs: .*objective.*$") as caught:
        policy_from_logprobs(preset)(Given(), Given().hidden, Given().weight, "torch")
    assert "\n" not in str(caught.value)


# What is not served is refused in one line ------------------------------------------------------------------------


@pytest.mark.parametrize("call", [name for name in CALLS if name != "linear_statistics"])
def test_a_second_derivative_is_refused_in_one_line(call):
    given = Given()
    hidden = given.hidden.clone().requires_grad_()
    value = CALLS[call](given, hidden, given.weight, "torch")
    with pytest.raises(RuntimeError, match=r"^linear_\w+: create_graph must be False, .*use backend='reference'$"):
        torch.autograd.grad(value, hidden, create_graph=True)
