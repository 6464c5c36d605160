"""Terms and reductions that read whole sequences: packed, padded, flat, with tokens left out."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    assert_close,
    make_case,
    policy_loss,
    run,
)
from test_terms import NEW, Objective, backends, sequence_case


@backends
@pytest.mark.parametrize("name", ["gspo", "pear", "trapo sequence mean", "eaft+gspo+all"])
def test_packed_tokens_with_sequence_ids_are_the_padded_batch(name, backend):
    o, case = NEW[name], sequence_case(b=5, t=7)
    case.inputs["mask"] &= torch.arange(7) < torch.tensor([[7], [3], [5], [1], [0]])  # one sequence without a token
    padded = run(case, o, backend)
    keep = case.inputs["mask"].reshape(-1)
    packed = sequence_case(b=5, t=7)
    packed.hidden = case.hidden.detach().reshape(35, -1)[keep]
    packed.targets = case.targets.reshape(-1)[keep]
    packed.inputs = {n: v.reshape(-1)[keep] for n, v in case.inputs.items()}
    ids = torch.tensor([9, 4, 7, 0, 2]).repeat_interleave(7)[keep]  # any numbers, in any order
    out = run(packed, o, backend, sequence_ids=ids)
    assert_close(out.loss, padded.loss, 1e-12, "loss")
    assert_close(out.grads[0], padded.grads[0].reshape(35, -1)[keep], 1e-11, "d_hidden")
    assert_close(out.grads[1], padded.grads[1], 1e-11, "d_weight")


@backends
def test_reductions_differ_by_their_weights_and_keep_the_normalizer(backend):
    case = sequence_case(b=4, t=6, seed=9)
    active = case.inputs["mask"] & (case.targets != -100)
    count = active.sum(1)
    assert len(set(count.tolist())) > 1
    by_sequence = []
    for i in range(4):
        part = sequence_case(b=4, t=6, seed=9)
        part.inputs["mask"] = case.inputs["mask"] & (torch.arange(4) == i)[:, None]
        by_sequence.append(run(part, Objective.trapo(reduction="sum"), backend).loss)
    total = sum(by_sequence)
    sequences = sum(loss / n for loss, n in zip(by_sequence, count, strict=True))
    assert_close(run(case, Objective.trapo(), backend).loss, total / active.sum(), 1e-12, "token mean")
    assert_close(
        run(case, Objective.trapo(reduction="sequence_mean"), backend).loss, sequences / 4, 1e-12, "sequence mean"
    )
    for reduction, expected in (("token_mean", total), ("sum", total), ("sequence_mean", sequences)):
        out = run(case, Objective.trapo(reduction=reduction), backend, normalizer=7)
        assert_close(out.loss, expected / 7, 1e-12, reduction)


@backends
def test_skip_inactive_leaves_the_weights_of_a_sequence_as_they_are(backend):
    case, o = sequence_case(b=4, t=6, seed=9), Objective.trapo(reduction="sequence_mean")
    whole, skipped = run(case, o, backend), run(case, o, backend, skip_inactive=True)
    assert whole.metrics["zero_gradient_tokens"] > 0
    assert_close(skipped.loss, whole.loss, 1e-12, "loss")
    assert_close(skipped.grads[1], whole.grads[1], 1e-12, "d_weight")


@pytest.mark.parametrize("objective", [Objective.gspo(), Objective.grpo(reduction="sequence_mean")])
def test_flat_targets_without_sequence_ids_are_refused(objective):
    case = make_case(8, 33)
    with pytest.raises(
        ValueError, match=r"^linear_policy_loss: targets must be \[B, T\] or sequence_ids given, .*\[8\]"
    ):
        policy_loss(case, objective, "torch")
    with pytest.raises(TypeError, match=r"^linear_policy_loss: sequence_ids must be int64; got float32"):
        policy_loss(case, objective, "torch", sequence_ids=torch.zeros(8))
    with pytest.raises(ValueError, match=r"^linear_policy_loss: sequence_ids must be \[8\] as targets; got \[7\]"):
        policy_loss(case, objective, "torch", sequence_ids=torch.zeros(7, dtype=torch.int64))
