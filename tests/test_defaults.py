"""What a program sets for its own tensors, a default dtype or a default device, changes nothing of ours."""

from __future__ import annotations

import functools

import pytest
import torch
from kernel_cases import BACKENDS, EVERYTHING, default_dtype, make_case

import trapo_kernels as tk

N, V = 12, 70


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    # No tensor of this device can take part in a result: whatever is made on it by accident fails.
    "meta": lambda: torch.device("meta"),
}


def policy_loss(objective, **options):
    def call(case, backend):
        out = tk.linear_policy_loss(
            case.hidden, case.weight, case.targets, objective, bias=case.bias, backend=backend,
            **{**case.inputs, **{n: v(case) if callable(v) else v for n, v in options.items()}},
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss, case.params())
        merged = tk.merge_metrics([out.metrics, out.metrics])
        return [out.loss, out.logprobs, out.entropy, *out.metrics.values(), *merged.values(), *grads]

    return call


def logprobs(case, backend):
    out = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, backend=backend, softcap=20.0
    )
    return [*out, *torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), case.params())]


def from_logits(case, backend):
    logits = (case.hidden @ case.weight.T).detach().requires_grad_()
    out = tk.logprobs_from_logits(logits, case.targets, entropy=True, backend=backend)
    loss = tk.policy_loss_from_logits(logits, case.targets, EVERYTHING, backend=backend, **case.inputs)
    value = out.logprobs.sum() + out.entropy.sum() + loss.loss
    return [*out, loss.loss, *loss.metrics.values(), *torch.autograd.grad(value, logits)]


def statistics(case, backend):
    names = ["top20_mass", "top20_entropy", "sum_sq", "argmax_match", "mean_logit"]
    found = tk.linear_statistics(case.hidden, case.weight, case.targets, names, backend=backend)
    return list(found.values())


def support(restrict):
    def call(case, backend):
        ids = torch.stack([case.targets.clamp(min=0), (case.targets + 3) % V], 1)
        out = tk.linear_support_logprobs(
            case.hidden, case.weight, ids, bias=case.bias, backend=backend, entropy=True, restrict=restrict
        )
        total = out.logprobs.sum() + out.entropy.sum()
        return [out.logprobs, out.entropy, *torch.autograd.grad(total, case.params())]

    return call


def divergence(kind):
    def call(case, backend):
        out = tk.linear_divergence(
            case.hidden, case.weight, case.hidden.detach().flip(1), case.weight.detach().flip(0), bias=case.bias,
            kind=kind, backend="reference" if backend == "reference" else "torch", normalizer=1e7 + 1,
        )  # fmt: skip
        return [*out, *torch.autograd.grad(out.loss, case.params())]

    return call


ids = {"sequence_ids": lambda case: torch.arange(case.targets.numel(), device="cpu") // 4}
reference_head = {
    "ref_hidden": lambda case: case.hidden.detach().flip(1),
    "ref_weight": lambda case: case.weight.detach().flip(0),
}
CALLS = {
    "everything": policy_loss(EVERYTHING),
    "a normalizer": policy_loss(EVERYTHING, normalizer=1e7 + 1),
    "statistics of rows": policy_loss(EVERYTHING, statistics=["top20_mass", "sum_sq"], skip_inactive=True),
    "sequence_mean": policy_loss(tk.Objective.sft(reduction="sequence_mean"), **ids),
    "gspo": policy_loss(tk.Objective.gspo(entropy_coef=0.01), **ids),
    "asft": policy_loss(tk.Objective.asft(), **reference_head),
    "grad_tolerance": policy_loss(EVERYTHING, grad_tolerance=0.1),
    "logprobs": logprobs,
    "from logits": from_logits,
    "statistics": statistics,
    "a support": support(False),
    "a sampling mask": support(True),
    **{kind: divergence(kind) for kind in ("forward_kl", "reverse_kl", "jsd")},
}


PRESETS = ["trapo", "grpo", "dr_grpo", "dapo", "sft", "dft", "luffy", "chord", "sed", "eaft", "asft", "pear", "lco"]
PRESETS += ["gspo", "cispo", "sapo"]


@functools.lru_cache(maxsize=1)
def with_torchs_defaults(name, dtype, backend):
    return CALLS[name](make_case(N, V, dtype=dtype, with_bias=True), backend)


# Defaults last, so that they change first, and what is compared with is made once for all of them.
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_gives_the_same_bits(default, name, dtype, backend):
    case = make_case(N, V, dtype=dtype, with_bias=True)
    expected = with_torchs_defaults(name, dtype, backend)
    with DEFAULTS[default]():
        actual = CALLS[name](case, backend)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_same_bits(default, preset):
    case = make_case(N, V, dtype=torch.float32)
    call = policy_loss(getattr(tk.Objective, preset)(), **ids, **reference_head)
    expected = call(case, None)
    with DEFAULTS[default]():
        actual = call(case, None)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
