"""Wrong use is refused in one line that names the argument, what it accepts and what it got."""

from __future__ import annotations

import re

import pytest
import torch

import trapo_kernels as tk

N, D, V = 4, 3, 7

GOOD = {
    "hidden": torch.zeros(N, D),
    "weight": torch.zeros(V, D),
    "targets": torch.zeros(N, dtype=torch.int64),
    "objective": tk.Objective.trapo(),
    "advantages": torch.ones(N),
}


def call(**wrong):
    return tk.linear_policy_loss(**{**GOOD, **wrong})


WRONG = [
    ({"hidden": None}, TypeError, "hidden must be a tensor; got NoneType"),
    (
        {"hidden": torch.zeros(N, D).long()},
        TypeError,
        "hidden must be float16, bfloat16, float32 or float64; got int64",
    ),
    ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be [..., D] with D >= 1; got []"),
    ({"hidden": torch.zeros(N, 0)}, ValueError, "hidden must be [..., D] with D >= 1; got [4, 0]"),
    (
        {"weight": torch.zeros(V, D, dtype=torch.bfloat16)},
        TypeError,
        "weight must have the dtype of hidden; got bfloat16 with float32 hidden",
    ),
    (
        {"weight": torch.zeros(V, D + 1)},
        ValueError,
        "weight must be [V, D] with V >= 1 and D=3 as in hidden; got [7, 4]",
    ),
    ({"weight": torch.zeros(0, D)}, ValueError, "weight must be [V, D] with V >= 1 and D=3 as in hidden; got [0, 3]"),
    ({"weight": torch.zeros(D)}, ValueError, "weight must be [V, D] with V >= 1 and D=3 as in hidden; got [3]"),
    (
        {"weight": torch.zeros(V, D, device="meta")},
        ValueError,
        "weight must be on the device of hidden, cpu; got meta",
    ),
    ({"bias": torch.zeros(V + 1)}, ValueError, "bias must be [V] with V=7; got [8]"),
    (
        {"bias": torch.zeros(V).double()},
        TypeError,
        "bias must have the dtype of hidden; got float64 with float32 hidden",
    ),
    ({"targets": torch.zeros(N, dtype=torch.int32)}, TypeError, "targets must be int64; got int32"),
    ({"targets": [0, 1, 2, 3]}, TypeError, "targets must be a tensor; got list"),
    (
        {"targets": torch.zeros(N + 1, dtype=torch.int64)},
        ValueError,
        "targets must be [4], as hidden without its last dimension; got [5]",
    ),
    (
        {"targets": torch.zeros(N, dtype=torch.int64, device="meta")},
        ValueError,
        "targets must be on the device of hidden, cpu; got meta",
    ),
    (
        {"targets": torch.tensor([0, 1, V, V + 2])},
        ValueError,
        "targets must be int64 in [0, V) or ignore_index=-100; got max 9 with V=7",
    ),
    (
        {"targets": torch.tensor([0, 1, -100, -2])},
        ValueError,
        "targets must be int64 in [0, V) or ignore_index=-100; got min -2 with V=7",
    ),
    (
        {"targets": torch.tensor([0, 1, -100, 2]), "ignore_index": -1},
        ValueError,
        "targets must be int64 in [0, V) or ignore_index=-1; got min -100 with V=7",
    ),
    ({"objective": "trapo"}, TypeError, "objective must be an Objective; got str"),
    ({"advantages": None}, ValueError, "advantages must be a tensor, which policy='clip' needs; got None"),
    (
        {"objective": tk.Objective.grpo(kl_coef=0.1)},
        ValueError,
        "ref_logprobs must be a tensor, which kl_coef=0.1 needs; got None",
    ),
    (
        {"objective": tk.Objective.grpo(tis_cap=2)},
        ValueError,
        "rollout_logprobs must be a tensor, which tis_cap=2 needs; got None",
    ),
    (
        {"advantages": torch.ones(N, dtype=torch.int64)},
        TypeError,
        "advantages must be float16, bfloat16, float32 or float64; got int64",
    ),
    (
        {"advantages": torch.ones(N + 1)},
        ValueError,
        "advantages must be [4] as targets or one per sequence, []; got [5]",
    ),
    ({"old_logprobs": torch.ones(1)}, ValueError, "old_logprobs must be [4] as targets; got [1]"),
    (
        {"old_logprobs": torch.ones(N, device="meta")},
        ValueError,
        "old_logprobs must be on the device of targets, cpu; got meta",
    ),
    ({"mask": torch.ones(N)}, TypeError, "mask must be bool; got float32"),
    ({"expert_mask": torch.full((N,), 2)}, ValueError, "expert_mask must be bool, or 0 and 1; got 2"),
    ({"mask": torch.full((N,), -1, dtype=torch.int8)}, ValueError, "mask must be bool, or 0 and 1; got -1"),
    ({"mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, "mask must be [4] as targets; got [5]"),
    ({"normalizer": 0}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got 0"),
    ({"normalizer": "8"}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got '8'"),
    ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got -1.0"),
    (
        {"normalizer": torch.ones(2)},
        ValueError,
        "normalizer must be a number above 0 or a 0-dim tensor; got shape [2]",
    ),
    (
        {"normalizer": torch.tensor(torch.inf)},
        ValueError,
        "normalizer must be a number above 0 or a 0-dim tensor; got inf",
    ),
    (
        {"normalizer": torch.tensor(torch.nan)},
        ValueError,
        "normalizer must be a number above 0 or a 0-dim tensor; got nan",
    ),
    ({"normalizer": float("inf")}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got inf"),
    ({"normalizer": 10**400}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got 1000"),
    ({"normalizer": True}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got True"),
    ({"statistics": None}, TypeError, "statistics must be a sequence of names among 'top20_mass', "),
    ({"statistics": [3]}, ValueError, "statistics must be among 'top20_mass', "),
    ({"skip_inactive": "yes"}, TypeError, "skip_inactive must be True or False; got 'yes'"),
    (
        {"grad_tolerance": torch.ones(2, 2)},
        ValueError,
        "grad_tolerance must be a number in [0, 1); got a tensor of shape",
    ),
    ({"sequence_ids": [0, 0, 1, 1]}, TypeError, "sequence_ids must be a tensor; got list"),
    ({"sequence_ids": torch.zeros(N)}, TypeError, "sequence_ids must be int64; got float32"),
    ({"ref_hidden": [1], "ref_weight": torch.zeros(V, D)}, TypeError, "ref_hidden must be a tensor; got list"),
    (
        {"ref_hidden": torch.zeros(N + 1, D), "ref_weight": torch.zeros(V, D)},
        ValueError,
        "ref_hidden must be [..., D'] with",
    ),
    (
        {"ref_hidden": torch.zeros(N, D), "ref_weight": torch.zeros(V + 1, D)},
        ValueError,
        "ref_weight must have V=7 rows",
    ),
    ({"weight": torch.zeros(V, D).to_sparse()}, TypeError, "weight must be a dense tensor; got a sparse_coo one"),
    ({"hidden": torch.zeros(N, D).to_sparse_csr()}, TypeError, "hidden must be a dense tensor; got a sparse_csr one"),
    (
        {"temperature": torch.ones(4, 1)},
        ValueError,
        "temperature must be a number, [4] as tokens, or one per sequence; got a tensor of shape [4, 1]",
    ),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be a finite number above 0; got tensor(-1.)"),
    ({"softcap": "30"}, ValueError, "softcap must be a finite number above 0 or None; got '30'"),
    ({"ignore_index": 10**30}, ValueError, "ignore_index must be an int of 64 bits; got 1000000"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int; got -100.0"),
    (
        {"backend": []},
        ValueError,
        "backend must be one of 'cuda', 'triton', 'cpu', 'torch', 'reference'",  # others may have been added here
    ),
    ({"backend": torch.ones(2)}, ValueError, "backend must be one of 'cuda', 'triton', 'cpu', 'torch', 'reference'"),
    (
        {"backend": ""},
        ValueError,
        "backend must be one of 'cuda', 'triton', 'cpu', 'torch', 'reference'",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0; got 0.0"),
    ({"softcap": -1.0}, ValueError, "softcap must be a finite number above 0 or None; got -1.0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be a finite number above 0; got inf"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int; got None"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of 'cuda', 'triton', 'cpu', 'torch', 'reference'"),
    (
        {"group": object()},
        TypeError,
        "group must be a torch.distributed ProcessGroup or None; got object",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=[message[:60] for _, _, message in WRONG])
def test_the_loss_refuses(wrong, kind, message):
    with pytest.raises(kind) as error:
        call(**wrong)
    text = str(error.value)
    assert text.startswith(f"linear_policy_loss: {message}"), text
    assert "\n" not in text


SHARED = {
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "softcap",
    "logit_scale",
    "ignore_index",
    "backend",
    "group",
}
HEAD_ONLY = [w for w in WRONG if set(w[0]) <= SHARED]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    HEAD_ONLY,
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_logprobs_refuse_the_same(wrong, kind, message):
    arguments = {name: GOOD[name] for name in ("hidden", "weight", "targets")}
    with pytest.raises(kind, match="^" + re.escape(f"linear_logprobs: {message}")):
        tk.linear_logprobs(**{**arguments, **wrong})


@pytest.mark.parametrize(
    ("logits", "targets", "kind", "message"),
    [
        (torch.zeros(N, V).long(), GOOD["targets"], TypeError, "logits must be float16, bfloat16, float32 or float64"),
        (torch.zeros(N, 0), GOOD["targets"], ValueError, "logits must be [..., V] with V >= 1; got [4, 0]"),
        (torch.zeros(N, V), GOOD["targets"][1:], ValueError, "targets must be [4], as logits without its last"),
        (torch.zeros(N, V), GOOD["targets"] + V, ValueError, "targets must be int64 in [0, V)"),
    ],
)
def test_from_logits_forms_refuse(logits, targets, kind, message):
    with pytest.raises(kind, match="^" + re.escape(f"logprobs_from_logits: {message}")):
        tk.logprobs_from_logits(logits, targets)
    with pytest.raises(kind, match="^" + re.escape(f"policy_loss_from_logits: {message}")):
        tk.policy_loss_from_logits(logits, targets, tk.Objective.sft())


def test_targets_of_masked_tokens_may_be_anything():
    out = call(targets=torch.tensor([0, 10**9, -7, 1]), mask=torch.tensor([True, False, False, True]))
    assert out.metrics["tokens"] == 2


def test_what_is_not_a_flag_is_refused_on_every_backend():
    for backend in ("torch", "reference", None):
        with pytest.raises(TypeError, match="linear_logprobs: entropy must be True or False; got 'x'"):
            tk.linear_logprobs(GOOD["hidden"], GOOD["weight"], GOOD["targets"], entropy="x", backend=backend)


def test_advantages_of_one_token_without_dimensions():
    arguments = {"hidden": torch.zeros(D), "targets": torch.tensor(1), "advantages": torch.tensor(2.0)}
    assert call(**arguments).loss == -2
    with pytest.raises(ValueError, match=r"advantages must be \[\] as targets; got \[1\]"):
        call(**{**arguments, "advantages": torch.ones(1)})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temprature": 0.7}, TypeError, "options must be among advantages, old_logprobs"),
        ({"temperature": -0.7}, ValueError, "temperature must be a finite number above 0; got -0.7"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of 'cuda'"),
        ({"skip_inactive": 3}, TypeError, "skip_inactive must be True or False; got 3"),
        ({"grad_tolerance": 1}, ValueError, "grad_tolerance must be a number in [0, 1); got 1"),
        ({"statistics": ["none"]}, ValueError, "statistics must be among"),
    ],
)
def test_a_module_refuses_options_when_it_is_made(options, kind, message):
    with pytest.raises(kind, match="^TrapoLoss: " + re.escape(message)) as error:
        tk.TrapoLoss(tk.Objective.grpo(), **options)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"^TrapoLoss: objective must be an Objective; got str"):
        tk.TrapoLoss("grpo")


def test_transforms_that_a_streamed_loss_is_not_for_name_the_function_that_was_called():
    hidden, weight, targets = torch.zeros(3, 2, D), GOOD["weight"], torch.zeros(2, dtype=torch.int64)

    def statistics(hidden):
        return tk.linear_statistics(hidden, weight, targets, ["sum_sq"], backend="torch")["sum_sq"]

    with pytest.raises(RuntimeError, match=r"^linear_statistics: a streamed loss is not for torch\.func transforms"):
        torch.vmap(statistics)(hidden)
    one = hidden[0].clone().requires_grad_()
    out = tk.linear_logprobs(one, weight, targets, backend="torch").logprobs
    with pytest.raises(RuntimeError, match=r"^linear_logprobs: is_grads_batched must be False"):
        torch.autograd.grad(out, one, torch.ones(3, 2), is_grads_batched=True)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (
            {"ref_options": 3},
            TypeError,
            "ref_options must map some of temperature, softcap, logit_scale to numbers; got 3",
        ),
        (
            {"ref_options": {"bias": 1.0}},
            TypeError,
            "ref_options must map some of temperature, softcap, logit_scale to",
        ),
        ({"ref_options": {"softcap": -1}}, ValueError, "ref_options: softcap must be a finite number above 0 or None"),
        ({"beta": torch.ones(2, 2)}, ValueError, "beta must be a number in (0, 1); got a tensor of shape [2, 2]"),
        ({"kind": ["jsd"]}, ValueError, "kind must be one of 'forward_kl', 'reverse_kl', 'jsd', 'mixed'; got ['jsd']"),
        ({"backend": []}, ValueError, "backend must be 'torch', 'reference' or None; got []"),
        ({"mask": torch.ones(N)}, TypeError, "mask must be bool; got float32"),
        ({"normalizer": -2.0}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got -2.0"),
        ({"ref_logits": torch.zeros(N, 4)}, ValueError, "ref_logits must be None where ref_hidden, ref_weight or ref"),
        ({"ref_shares": [0.5, 0.5]}, ValueError, "ref_shares must be 1 numbers, at least 0, or None; got [0.5, 0.5]"),
        ({"ref_hidden": [GOOD["hidden"]]}, ValueError, "ref_weight must be a list, one for each of some references"),
        ({"ref_hidden": None}, TypeError, "ref_hidden must be a tensor; got NoneType"),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_logits": torch.zeros(N, 3)},
            ValueError,
            "ref_logits must be [..., V] with V=",
        ),
    ],
    ids=str,
)
def test_a_divergence_refuses(wrong, kind, message):
    hidden, weight = GOOD["hidden"], GOOD["weight"]
    with pytest.raises(kind, match="^" + re.escape(f"linear_divergence: {message}")) as error:
        tk.linear_divergence(hidden, weight, **{"ref_hidden": hidden, "ref_weight": weight, **wrong})
    assert "\n" not in str(error.value)


H, W, TARGETS, GRPO = torch.zeros(N, D), torch.zeros(V, D), torch.zeros(N, dtype=torch.int64), tk.Objective.grpo()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: tk.linear_divergence(x, W, x, W).loss, "linear_divergence: hidden"),
        (lambda x: tk.linear_divergence(x, W, x, W, backend="reference").loss, "linear_divergence: hidden"),
        (
            lambda x: tk.linear_policy_loss(H, W, TARGETS, GRPO, advantages=x[:, 0]).loss,
            "linear_policy_loss: advantages",
        ),
        (
            lambda x: tk.linear_policy_loss(H, W, TARGETS, GRPO, advantages=H[:, 0], old_logprobs=x[:, 0]).loss,
            "linear_policy_loss: old_logprobs",
        ),
        (lambda x: tk.policy_loss_from_logprobs(x[:, 0], GRPO, advantages=H[:, 0]).loss, "policy_loss_from_logprobs: "),
    ],
)
def test_a_mapped_input_is_refused_in_one_line(call, named):
    with pytest.raises(RuntimeError, match=rf"^{named}\w* must not be mapped by torch\.func\.vmap; give it \[B, T\]"):
        torch.func.vmap(call)(torch.randn(2, N, D))
