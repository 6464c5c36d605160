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
    ({"expert_mask": torch.ones(N, dtype=torch.int64)}, TypeError, "expert_mask must be bool; got int64"),
    ({"mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, "mask must be [4] as targets; got [5]"),
    ({"normalizer": 0}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got 0"),
    ({"normalizer": "8"}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got '8'"),
    ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got -1.0"),
    (
        {"normalizer": torch.ones(2)},
        ValueError,
        "normalizer must be a number above 0 or a 0-dim tensor; got shape [2]",
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


HEAD_ONLY = [w for w in WRONG if not {"objective", "advantages", "mask", "expert_mask", "normalizer"} & set(w[0])]


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [w for w in HEAD_ONLY if "old_logprobs" not in w[0]],
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
