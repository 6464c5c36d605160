"""What each rank does for test_vocab_parallel.py: run with torch.distributed's environment; prints one JSON line.

Each check is a function of (group, rank, world); it raises on any rank where something is wrong.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback

import device
import pytest
import torch
import torch.distributed as dist
from hostile_memory import hostile_memory
from kernel_cases import DEVICE, EVERYTHING, HEADS, TOLERANCE, assert_close, make_case, oracle
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import trapo_kernels as tk
from trapo_kernels.shards import vocab_parallel

VOCAB = 257
LCO = tk.Objective(expert="lco_mse", policy="clip", entropy_coef=0.02)
GSPO = tk.Objective.gspo(entropy_coef=0.01, clip_low=0.1, clip_high=0.2)


def sizes_of(vocab, world):
    """Uneven shards; of four, one is empty."""
    return {1: [vocab], 2: [vocab - 100, 100], 4: [vocab - 150, 0, 100, 50]}[world]


def shard(t, rank, world):
    sizes = sizes_of(t.shape[0], world)
    start = sum(sizes[:rank])
    return t.detach()[start : start + sizes[rank]].clone().requires_grad_()


def run_sharded(case, objective, group, rank, world, backend="torch", **options):
    """(result, gradients of hidden and of the whole parameters, put together)."""
    hidden = case.hidden.detach().clone().requires_grad_()
    parts = [shard(p, rank, world) for p in case.params()[1:]]
    out = tk.linear_policy_loss(
        hidden, parts[0], case.targets, objective, bias=parts[1] if len(parts) > 1 else None,
        backend=backend, group=group, **{**case.inputs, **case.head, **options},
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, [hidden, *parts])
    return out, [grads[0], *(whole(g, p, world) for g, p in zip(grads[1:], case.params()[1:], strict=True))]


def whole(part, like, world):
    sizes = sizes_of(like.shape[0], world)
    padded = part.new_zeros(max(sizes), *like.shape[1:])
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])


def compare(case, objective, group, rank, world, dtype=torch.float64, **options):
    with tk.budget_mb(options.pop("budget", 0.05)):
        out, grads = run_sharded(case, objective, group, rank, world, **options)
    options.pop("backend", None)
    expected = oracle(case, objective, **options)
    tolerance = TOLERANCE[dtype]
    for name in ("loss", "logprobs", "entropy"):
        assert_close(getattr(out, name), getattr(expected, name), tolerance, name, floor=1.0)
    for name in expected.metrics:
        assert_close(out.metrics[name], expected.metrics[name], tolerance, name, floor=1.0)
    for name, a, b in zip(("d_hidden", "d_weight", "d_bias"), grads, expected.grads, strict=False):
        assert a.dtype == dtype
        assert_close(a, b, tolerance, name)


def loss_and_gradients_are_the_oracles_in_every_dtype(*ranks):
    for dtype in TOLERANCE:
        compare(make_case(60, VOCAB, dtype=dtype), EVERYTHING, *ranks, dtype=dtype)


def loss_and_gradients_are_the_oracles_under_every_head(*ranks):
    for head in HEADS.values():
        compare(make_case(60, VOCAB, **head), EVERYTHING, *ranks)
        compare(make_case(60, VOCAB, **head), LCO, *ranks)


def memory_that_nobody_wrote_does_not_matter(*ranks):
    for dtype in TOLERANCE:
        with hostile_memory():
            compare(make_case(60, VOCAB, dtype=dtype, with_bias=True), EVERYTHING, *ranks, dtype=dtype)
            compare(make_case(60, VOCAB, dtype=dtype), LCO, *ranks, dtype=dtype)


def the_reference_backend_takes_a_group_too(*ranks):
    compare(make_case(40, VOCAB, with_bias=True), EVERYTHING, *ranks, backend="reference")


def coupled_objectives_and_skipped_tokens_work(*ranks):
    case = make_case(40, VOCAB)
    compare(case, tk.Objective.trapo(), *ranks, skip_inactive=True)
    ids = torch.arange(40) // 8
    compare(case, GSPO, *ranks, sequence_ids=ids)


def weights_of_the_policy_term_are_those_of_the_oracle(*ranks):
    case = make_case(40, VOCAB)
    case.inputs["policy_weights"] = torch.arange(40) % 4 / 2
    compare(case, EVERYTHING, *ranks)
    compare(case, tk.Objective.trapo(), *ranks, skip_inactive=True)
    compare(case, GSPO, *ranks, sequence_ids=torch.arange(40) // 10)


def logprobs_and_entropies_are_differentiable(group, rank, world):
    case = make_case(40, VOCAB, with_bias=True, softcap=3.0)
    hidden = case.hidden.detach().clone().requires_grad_()
    weight, bias = (shard(p, rank, world) for p in case.params()[1:])
    out = tk.linear_logprobs(hidden, weight, case.targets, bias=bias, entropy=True, softcap=3.0, group=group)
    full = tk.linear_logprobs(
        case.hidden, case.weight, case.targets, bias=case.bias, entropy=True, softcap=3.0, backend="reference"
    )
    u = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((u * (out.logprobs + out.entropy)).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((u * (full.logprobs + full.entropy)).sum(), case.params())
    assert_close(out.logprobs, full.logprobs, 1e-11, "logprobs")
    assert_close(out.entropy, full.entropy, 1e-11, "entropy")
    assert_close(grads[0], expected[0], 1e-11, "d_hidden")
    assert_close(whole(grads[1], case.weight, world), expected[1], 1e-11, "d_weight")
    assert_close(whole(grads[2], case.bias, world), expected[2], 1e-11, "d_bias")


def hostile_numbers_are_those_of_the_oracle(*ranks):
    case = make_case(30, VOCAB, with_bias=True)
    with torch.no_grad():  # a shard without a possible class, and huge logits
        case.bias[-60:] = -torch.inf
        case.targets[case.targets >= VOCAB - 60] = 3
        case.hidden.mul_(40).round_()
        case.weight.mul_(100).round_()
    case.inputs["old_logprobs"] = case.inputs["ref_logprobs"] = None
    compare(case, tk.Objective.trapo(entropy_coef=0.1), *ranks)
    case = make_case(30, VOCAB, dtype=torch.float32)
    with torch.no_grad():
        case.hidden[0, 0] = torch.nan
    case.targets[0], case.inputs["mask"][0] = 1, True
    out, grads = run_sharded(case, EVERYTHING, *ranks)
    assert out.loss.isnan()
    assert grads[0][0].isnan().all()
    assert torch.isfinite(grads[0][1:]).all()


def the_targets_logit_of_16_bits_is_not_rounded(group, rank, world):
    """It has a second half in a column of the hidden states of its own, so that it lies between two numbers of bf16."""
    targets = torch.tensor([0, 5, 120, 170, 250, 256])
    n, rows = len(targets), torch.arange(6)
    upper = torch.tensor([16.0, 24.0, 32.0, 60.0, 20.0, -3.0])
    weight = torch.zeros(VOCAB, 2 * n)
    weight[:, :n] = -2.0
    weight[targets, rows], weight[targets, n + rows] = upper, 0.002 * upper
    hidden = torch.cat([torch.eye(n), torch.eye(n)], 1).bfloat16()
    part = shard(weight.bfloat16(), rank, world)
    z = torch.full((n, VOCAB), -2.0, dtype=torch.float64)
    z[rows, targets] = upper.double() + weight.bfloat16()[targets, n + rows].double()
    others = z.scatter(1, targets[:, None], -torch.inf).logsumexp(1) - z[rows, targets]
    expected = -others.exp().log1p()
    sft = tk.Objective.sft(reduction="sum")
    for out in (
        tk.linear_logprobs(hidden, part, targets, group=group),
        tk.linear_policy_loss(hidden, part, targets, sft, group=group),
    ):
        assert (out.logprobs.double() / expected - 1).abs().max() < 1e-5
    grad = whole(torch.autograd.grad(out.loss, part)[0], weight, world)[:, :n].double().t()
    assert ((grad.sum(1) - 2 * grad[rows, targets]) / -grad[rows, targets] - 2).abs().max() < 2e-2
    assert (grad[rows, targets] / torch.expm1(expected) - 1).abs().max() < 2e-2


def a_target_of_no_rank_is_no_number(group, rank, world):
    sizes = sizes_of(VOCAB, world)
    part = vocab_parallel.shard_of(group, sizes)
    kernel = vocab_parallel.sharded(tk.backends()["torch"].kernel, part)
    logits = torch.randn(3, part.size)
    found = kernel.stats(logits, torch.tensor([VOCAB, -7, 1]), None, True).finish()
    assert found.logprobs.isnan().tolist() == [True, True, False]


def a_second_backward_is_right(group, rank, world):
    case = make_case(30, VOCAB)
    hidden, weight = case.hidden.detach().clone().requires_grad_(), shard(case.weight, rank, world)
    loss = tk.linear_policy_loss(hidden, weight, case.targets, EVERYTHING, group=group, **case.inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(hidden.grad, 2 * oracle(case, EVERYTHING).grads[0], 1e-11, "d_hidden")


def nothing_of_the_size_of_the_vocabulary_is_sent(group, rank, world):
    case = make_case(50, VOCAB, width=8)
    case.targets.clamp_(min=0)
    case.inputs["mask"] = None
    sent, real = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(name):
        def call(first, *args, **kwargs):
            sent.append((name, first.numel() if name == "all_reduce" else sum(t.numel() for t in first)))
            return real[name](first, *args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, counted(name))
    try:
        weight = shard(case.weight, rank, world)
        with torch.no_grad():
            tk.linear_logprobs(case.hidden, weight, case.targets, group=group)
        assert sent == [("all_gather", 24 * world), ("all_reduce", 50), ("all_reduce", 150)], sent
        sent.clear()
        hidden = case.hidden.detach().clone().requires_grad_()
        tk.linear_policy_loss(hidden, weight, case.targets, EVERYTHING, group=group, **case.inputs).loss.backward()
        assert sent == [("all_gather", 24 * world), ("all_reduce", 50), ("all_reduce", 200), ("all_reduce", 400)], sent
    finally:
        for name, fn in real.items():
            setattr(dist, name, fn)


def a_dtensor_weight_brings_its_group_and_gets_a_dtensor_gradient(group, rank, world):
    mesh = init_device_mesh(DEVICE, (world,))
    for vocab in (VOCAB, 5):  # 257 over 4: 65, 65, 65, 62; 5 over 4: 2, 2, 1, 0
        case = make_case(30, vocab, with_bias=True)
        weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
        bias = distribute_tensor(case.bias.detach(), mesh, [Shard(0)]).requires_grad_()
        hidden = distribute_tensor(case.hidden.detach(), mesh, [Replicate()]).requires_grad_()
        out = tk.linear_policy_loss(hidden, weight, case.targets, EVERYTHING, bias=bias, **case.inputs)
        out.loss.backward()
        expected = oracle(case, EVERYTHING)
        assert_close(out.loss, expected.loss, 1e-11, "loss")
        for name, p, right in zip("hwb", (hidden, weight, bias), expected.grads, strict=True):
            assert isinstance(p.grad, DTensor)
            assert p.grad.placements == p.placements
            assert_close(p.grad.full_tensor(), right, 1e-11, name)


def what_cannot_be_is_refused_on_every_rank(group, rank, world):
    case = make_case(20, VOCAB)
    case.inputs["mask"] = None
    weight = shard(case.weight, rank, world)

    def refused(kind, message, *, hidden=case.hidden, weight=weight, targets=case.targets, **options):
        inputs = {n: None if v is None else v[: len(targets)] for n, v in case.inputs.items()}
        with pytest.raises(kind) as error:
            tk.linear_policy_loss(hidden, weight, targets, EVERYTHING, **inputs, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    if world > 1:
        different = (case.targets + rank).clamp(0, VOCAB - 1)
        refused(ValueError, "got targets: different ones", targets=different, group=group)
        n = 20 - rank
        refused(ValueError, "the number of tokens", hidden=case.hidden[:n], targets=case.targets[:n], group=group)
    refused(NotImplementedError, "statistics", statistics=["sum_sq"], group=group)
    if DEVICE == "cpu":  # elsewhere the values are not looked at
        outside = case.targets.masked_fill(case.targets > -1, VOCAB)
        refused(ValueError, f"with V={VOCAB}", targets=outside, group=group)
    mesh = init_device_mesh(DEVICE, (world,))
    sideways = distribute_tensor(case.weight.detach(), mesh, [Shard(1)])
    refused(ValueError, "weight must be a plain tensor or a DTensor, replicated or Shard(0)", weight=sideways)
    rows = distribute_tensor(case.hidden.detach(), mesh, [Shard(0)])
    refused(ValueError, "hidden must be a plain tensor or a replicated DTensor", hidden=rows)


def ranks_that_differ_are_told_so_and_never_wait(group, rank, world):
    """One row an argument: what the odd rank gives in its place, and what the message names."""
    case = make_case(20, VOCAB, dtype=torch.float32)
    weight, odd = shard(case.weight, rank, world), rank == world - 1
    ids = torch.arange(20) // 5
    common = {
        "hidden": case.hidden, "weight": weight, "targets": case.targets, "objective": GSPO, "sequence_ids": ids,
        "group": group, **case.inputs, "policy_weights": torch.ones(20),
    }  # fmt: skip
    swapped = case.targets.clone()
    swapped[0], swapped[1] = 0, 2
    other = swapped.clone()
    other[0], other[1] = 2, 1  # Σ i · target is the same
    wide = case.to(torch.float64)
    rows = [
        ("objectives", {"objective": tk.Objective.gspo()}),
        ("objectives", {"objective": EVERYTHING}),
        ("head options", {"temperature": 0.7}),
        ("head options", {"softcap": 3.0}),
        ("head options", {"ignore_index": -1}),
        ("shapes and dtypes", {"hidden": wide.hidden, "weight": weight.double()}),
        ("shapes and dtypes", {"bias": torch.zeros(weight.shape[0])}),
        ("backends", {"backend": "reference"}),
        ("trained parameters", {"hidden": case.hidden.detach()}),
        ("given inputs", {"old_logprobs": None}),
        ("mask", {"mask": ~case.inputs["mask"]}),
        ("expert_mask", {"expert_mask": ~case.inputs["expert_mask"]}),
        ("advantages", {"advantages": torch.zeros(20)}),
        ("old_logprobs", {"old_logprobs": case.inputs["old_logprobs"] - 1}),
        ("ref_logprobs", {"ref_logprobs": case.inputs["ref_logprobs"] - 1}),
        ("rollout_logprobs", {"rollout_logprobs": case.inputs["rollout_logprobs"] - 1}),
        ("policy_weights", {"policy_weights": torch.full((20,), 0.5)}),
        ("sequence_ids", {"sequence_ids": ids + 1}),
        ("normalizer", {"normalizer": 7.0}),
        ("settings", {"skip_inactive": True}),
        ("an error on rank", {"advantages": None}),
        ("an error on rank", {"temperature": -1.0}),
        ("an error on rank", {"weight": torch.zeros(3)}),
        ("an error on rank", {"weight": None}),
    ]
    for named, wrong in rows:
        with pytest.raises(Exception, match="linear_policy_loss: ") as error:
            tk.linear_policy_loss(**{**common, **(wrong if odd else {})})
        assert named in str(error.value) or (odd and named.startswith("an error")), (named, str(error.value))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got targets: different ones"):
        tk.linear_logprobs(case.hidden, weight, other if odd else swapped, group=group)
    with pytest.raises(ValueError, match="got the memory budget"), tk.budget_mb(20 + rank):
        tk.linear_logprobs(case.hidden, weight, case.targets, group=group)
    first = {name: common[name] for name in ("hidden", "weight", "targets", "group")}
    function, arguments = (tk.linear_logprobs, first) if odd else (tk.linear_policy_loss, common)
    with pytest.raises(ValueError, match="got functions: different ones"):
        function(**arguments)
    with torch.set_grad_enabled(not odd), pytest.raises(ValueError, match="got trained parameters: different ones"):
        tk.linear_policy_loss(**common)
    # After all that the group still works, and a backward whose rows differ is refused too.
    out = tk.linear_logprobs(case.hidden, weight, case.targets, group=group)
    with pytest.raises(ValueError, match="got gradients: different ones"):
        out.logprobs[: 20 - rank].sum().backward()


def log_probabilities_on_a_support_are_those_of_the_whole_head(group, rank, world):
    g = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(VOCAB, generator=g)[:9] for _ in range(20)])
    ids[0], ids[1, 2:] = -1, -1
    every = torch.arange(VOCAB).expand(20, VOCAB)
    for head, support, restrict in ((h, ids, r) for h in ({}, {"softcap": 3.0}) for r in (False, True)):
        case = make_case(20, VOCAB, with_bias=True, **head)
        for chosen, backend in ((support, "torch"), (support, "cpu"), (support[:, :1], "torch"), (every, "torch")):
            hidden = case.hidden.detach().clone().requires_grad_()
            parts = [shard(p, rank, world) for p in case.params()[1:]]
            options = {"entropy": True, "restrict": restrict, **case.head}
            if DEVICE != "cpu":
                backend = "torch"
            found = tk.linear_support_logprobs(
                hidden, parts[0], chosen, bias=parts[1], group=group, backend=backend, **options
            )
            right = tk.linear_support_logprobs(
                case.hidden, case.weight, chosen, bias=case.bias, backend="reference", **options
            )
            whole_tail = chosen is every or restrict
            totals = [f.logprobs.sum() + f.entropy.sum() + (0 if whole_tail else f.tail.sum()) for f in (found, right)]
            mine = torch.autograd.grad(totals[0], [hidden, *parts])
            mine = [mine[0], *(whole(g, p, world) for g, p in zip(mine[1:], case.params()[1:], strict=True))]
            pairs = [(found.logprobs, right.logprobs), (found.entropy, right.entropy)]
            pairs += [] if whole_tail else [(found.tail, right.tail)]
            for a, b in [*pairs, *zip(mine, torch.autograd.grad(totals[1], case.params()), strict=True)]:
                assert_close(a, b, TOLERANCE[torch.float64], "support", floor=1.0)


def divergences_from_a_top_k_are_those_of_the_whole_head(group, rank, world):
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(20, VOCAB, generator=g, dtype=torch.float64).log_softmax(1)
    logprobs, ids = teacher.topk(5, 1)
    case = make_case(20, VOCAB, with_bias=True)
    for tail, kind in (("bucket", "mixed"), ("drop", "forward_kl"), ("renormalise", "jsd")):
        hidden = case.hidden.detach().clone().requires_grad_()
        parts = [shard(p, rank, world) for p in case.params()[1:]]
        options = {"kind": kind, "tail": tail, "weights": torch.rand(20, generator=g)}
        found = tk.linear_topk_divergence(hidden, parts[0], ids, logprobs, bias=parts[1], group=group, **options)
        right = tk.linear_topk_divergence(
            case.hidden, case.weight, ids, logprobs, bias=case.bias, backend="reference", **options
        )
        mine = torch.autograd.grad(found.loss, [hidden, *parts])
        mine = [mine[0], *(whole(d, p, world) for d, p in zip(mine[1:], case.params()[1:], strict=True))]
        wanted = torch.autograd.grad(right.loss, case.params())
        for a, b in [(found.tokens, right.tokens), *zip(mine, wanted, strict=True)]:
            assert_close(a, b, TOLERANCE[torch.float64], tail, floor=1.0)
    other = logprobs + rank
    with pytest.raises(ValueError, match="got ref_logprobs: different ones"):
        tk.linear_topk_divergence(hidden, parts[0], ids, other, bias=parts[1], group=group)


CHECKS = [
    divergences_from_a_top_k_are_those_of_the_whole_head,
    log_probabilities_on_a_support_are_those_of_the_whole_head,
    loss_and_gradients_are_the_oracles_in_every_dtype,
    loss_and_gradients_are_the_oracles_under_every_head,
    memory_that_nobody_wrote_does_not_matter,
    the_reference_backend_takes_a_group_too,
    coupled_objectives_and_skipped_tokens_work,
    weights_of_the_policy_term_are_those_of_the_oracle,
    logprobs_and_entropies_are_differentiable,
    hostile_numbers_are_those_of_the_oracle,
    the_targets_logit_of_16_bits_is_not_rounded,
    a_target_of_no_rank_is_no_number,
    a_second_backward_is_right,
    nothing_of_the_size_of_the_vocabulary_is_sent,
    a_dtensor_weight_brings_its_group_and_gets_a_dtensor_gradient,
    what_cannot_be_is_refused_on_every_rank,
    ranks_that_differ_are_told_so_and_never_wait,
]


def main():
    torch.set_num_threads(1)
    device.activate()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=datetime.timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for check in CHECKS:
        try:
            check(dist.group.WORLD, rank, world)
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
            print(results[check.__name__], file=sys.stderr, flush=True)
        # A rank that failed has left the others waiting: nothing after it can be trusted.
        failed = torch.tensor(float(results[check.__name__] is not None))
        try:
            dist.all_reduce(failed)
        except Exception:
            failed.fill_(1)
        if failed:
            break
    print(json.dumps(results), flush=True)
    os._exit(0 if all(v is None for v in results.values()) else 1)


if __name__ == "__main__":
    sys.exit(main())
