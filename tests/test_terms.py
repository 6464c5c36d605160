"""Every term against the published formula, transcribed in plain Python floats with its stop-gradients held.

`published` shares no code with the package. Gradients are checked against finite differences of it: what
docs/methods.md writes sg(·) around is computed at the point itself and kept while logits move.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from kernel_cases import (
    BACKENDS,
    DTYPES,
    HEADS,
    STREAMED,
    assert_close,
    assert_same_result,
    gemms,
    make_case,
    oracle,
    policy_loss,
    run,
    slow,
)

import trapo_kernels as tk

Objective = tk.Objective
backends = pytest.mark.parametrize("backend", BACKENDS)

# Every term of docs/methods.md, with parameters that make each branch happen in a vocabulary of 33.
NEW = {
    "chord": Objective.chord(0.3),
    "weighted": Objective(expert="weighted", policy="clip"),
    "sed": Objective.sed(sed_k=5, sed_tau=0.55, sed_coef=0.7),
    "eaft": Objective.eaft(eaft_power=1.3),
    "pear": Objective.pear(pear_gamma=0.9),
    "pear by block": Objective.pear(pear_gamma=0.9, pear_level="block", pear_block=2),
    "pear by sequence": Objective.pear(pear_level="sequence"),
    "lco_mse": Objective.lco("mse", lco_beta=0.7),
    "lco_logcosh": Objective.lco("logcosh", lco_beta=0.7, lco_neg=100.0),
    "lco_kld": Objective.lco("kld", lco_beta=0.7, lco_neg=2.0),
    "gspo": Objective.gspo(clip_low=0.1, clip_high=0.2),
    "cispo": Objective.cispo(clip_low=0.3),
    "sapo": Objective.sapo(tis_cap=2.0),
    "eaft+gspo+all": Objective(
        expert="eaft", policy="gspo", clip_low=0.1, clip_high=0.2, entropy_coef=0.05, kl_coef=0.1, tis_cap=2.0,
        expert_coef=0.3, policy_coef=0.6, reduction="sequence_mean",
    ),
    "lco+cispo": Objective(expert="lco_mse", policy="cispo", clip_high=0.28, entropy_coef=0.02),
    "pear+sapo": Objective(expert="pear", policy="sapo", policy_coef=0.4, reduction="sum"),
    "trapo sequence mean": Objective.trapo(entropy_coef=0.01, reduction="sequence_mean"),
}  # fmt: skip
OLD = {
    "sft": Objective.sft(),
    "trsft": Objective.trapo(),
    "dft": Objective.dft(),
    "luffy": Objective.luffy(),
    "unclipped": Objective(expert=None, policy="unclipped"),
    "clip": Objective.dapo(),
    "dual clip": Objective.grpo(dual_clip=3.0),
    "tis": Objective.grpo(tis_cap=2.0),
    "tis, both bounds": Objective.grpo(tis_cap=1.2, tis_low=0.8),
    "icepop": Objective.grpo(tis_cap=1.2, tis_low=0.8, tis_mode="mask"),
    "tis of sequences": Objective.grpo(tis_cap=1.5, tis_level="sequence"),
    "masked sequences": Objective.grpo(tis_cap=1.5, tis_low=0.3, tis_mode="mask", tis_level="sequence"),
    "dppo_tv": Objective(policy="dppo_tv", clip_low=0.02, clip_high=0.03),
    "dppo_kl": Objective(policy="dppo_kl", clip_low=0.01, clip_high=0.02, dppo_cap=1.3),
}


def test_every_term_in_the_tables_is_tried_here():
    tried = {(o.expert, o.policy) for o in (NEW | OLD).values()}
    assert {expert for expert, _ in tried} | {"asft"} >= set(tk.EXPERT_TERMS)  # asft: the next test but one
    assert {policy for _, policy in tried} >= set(tk.POLICY_TERMS)


# The formulas ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One token: what moves with the logits (lp, z, entropy, top mass and entropy), and its constants."""

    lp: float
    z: float
    entropy: float
    mass: float
    top_entropy: float
    advantage: float
    old: float
    ref: float
    rollout: float


def expert_loss(o, x, held, sequence, at):
    """`held`: the token where sg(·) is taken; `sequence`: the expert tokens of its sequence, held; `at`: its place."""
    p, hp = math.exp(x.lp), math.exp(held.lp)
    if o.expert == "sft":
        return -x.lp
    if o.expert == "trsft":
        return -x.lp if p >= o.alpha else 1 - math.log(o.alpha) - p / o.alpha
    if o.expert == "dft":
        return -hp * x.lp
    if o.expert == "luffy":
        return -x.advantage * p / (p + o.luffy_gamma)
    if o.expert == "weighted":
        return -x.advantage * x.lp
    if o.expert == "chord":
        return -hp * (1 - hp) * x.lp
    if o.expert == "sed":
        return -x.lp + (o.sed_coef * (p * p - p + 0.25) if held.mass < o.sed_tau else 0)
    if o.expert == "eaft":
        return -((held.top_entropy / 3) ** o.eaft_power) * x.lp
    if o.expert == "pear":
        if o.pear_level == "sequence":
            total = sum(min(max(t.lp - t.old, -0.08), 0.3) for t in sequence)
            return -math.exp(min(max(total, -10), 5)) * x.lp
        later = sequence[at + 1 if o.pear_level == "token" else (at // o.pear_block + 1) * o.pear_block :]
        total = sum(min(max(t.lp - t.old, -0.08), 0.3) for t in later)
        return -math.exp(min(max(len(later) * math.log(o.pear_gamma) + total, -10), 5)) * x.lp
    beta = o.lco_beta if x.advantage > 0 else o.lco_neg * o.lco_beta
    if o.expert == "lco_kld":
        grown = math.exp(x.old) * math.exp(x.advantage / beta)
        q = grown / (1 - math.exp(x.old) + grown)
        return -(q - hp) / (1 - hp) * x.lp
    miss = x.z - (held.z + x.advantage / beta)
    return miss * miss if o.expert == "lco_mse" else math.log(math.cosh(miss))


def own_loss(o, x, held, sequence):
    r, a = math.exp(x.lp - x.old), x.advantage
    low = -math.inf if o.clip_low is None else 1 - o.clip_low
    high = math.inf if o.clip_high is None else 1 + o.clip_high
    if o.policy == "gspo":
        s = math.exp(sum(t.lp - t.old for t in sequence) / len(sequence))
        r = s * math.exp(x.lp) / math.exp(held.lp)
    if o.policy in ("dppo_tv", "dppo_kl"):  # verl, core_algos.py, without its clamp of log r to ±20
        p, mu = math.exp(held.lp), math.exp(x.old)
        kl = mu * (x.old - held.lp) + (1 - mu) * math.log((1 - mu + 1e-8) / (1 - p + 1e-8))
        if o.policy == "dppo_tv":
            valid = p - mu <= o.clip_high if a > 0 else p - mu >= -o.clip_low
        else:
            valid = kl <= o.clip_high or p <= mu if a > 0 else kl <= o.clip_low or p >= mu
        return -a * min(math.exp(held.lp - x.old), o.dppo_cap) * x.lp * valid
    if o.policy == "cispo":
        return -min(max(math.exp(held.lp - x.old), low), high) * a * x.lp
    if o.policy == "sapo":
        tau = 1.0 if a > 0 else 1.05
        return -4 / tau * a / (1 + math.exp(-tau * (r - 1)))
    loss = -min(r * a, min(max(r, low), high) * a)
    return min(loss, -o.dual_clip * a) if o.dual_clip is not None and a < 0 else loss


def importance(o, x, own):
    """verl, rollout_corr_helper.py: TIS for a single bound, IcePop for two, of a token or of its sequence."""
    if o.tis_cap is None:
        return 1.0
    weight = math.exp(sum(t.old - t.rollout for t in own) if o.tis_level == "sequence" else x.old - x.rollout)
    low = -math.inf if o.tis_low is None else o.tis_low
    if o.tis_mode == "mask":
        return weight if low <= weight <= o.tis_cap else 0.0
    return max(min(weight, o.tis_cap), low)


def published(o, rows, held, expert, shape, active):
    """The loss of a batch: rows of all tokens [B·T], those active, in B sequences."""
    length = shape[1]
    parts, regions = [], {True: [], False: []}
    for start in range(0, len(rows), length):
        mine = [i for i in range(start, start + length) if active[i]]
        experts, own = [i for i in mine if expert[i]], [i for i in mine if not expert[i]]
        total = 0.0
        for i in mine:
            x = rows[i]
            loss = -o.entropy_coef * x.entropy
            if expert[i] and o.expert is not None:
                loss += o.expert_coef * expert_loss(o, x, held[i], [held[j] for j in experts], experts.index(i))
            if not expert[i]:
                if o.policy is not None:
                    weight = importance(o, x, [rows[j] for j in own])
                    loss += o.policy_coef * weight * own_loss(o, x, held[i], [held[j] for j in own])
                loss += o.kl_coef * (math.exp(x.ref - x.lp) - (x.ref - x.lp) - 1)
            total += loss
            regions[bool(expert[i])].append(loss)
        parts.append((total, len(mine)))
    if o.reduction == "sequence_mean":
        means = [total / count for total, count in parts if count]
        return sum(means) / len(means)
    if o.reduction == "region_mean":
        return sum(sum(losses) / len(losses) for losses in regions.values() if losses)
    total = sum(total for total, _ in parts)
    return total if o.reduction == "sum" else total / sum(count for _, count in parts)


def rows_of(case, hidden, weight, bias, k):
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * case.head.get("logit_scale", 1.0)
    if case.head.get("softcap"):
        z = case.head["softcap"] * torch.tanh(z / case.head["softcap"])
    z = (z / case.head.get("temperature", 1.0)).reshape(-1, weight.shape[0])
    log_pi = z - z.exp().sum(-1, keepdim=True).log()
    targets = case.targets.reshape(-1).clamp(min=0)
    out = []
    for i, y in enumerate(targets.tolist()):
        row = sorted(log_pi[i].tolist(), reverse=True)
        top20 = [math.exp(lp) for lp in row[:20]]
        share = [p / sum(top20) for p in top20]
        out.append(
            Row(
                lp=log_pi[i, y].item(),
                z=z[i, y].item(),
                entropy=-sum(math.exp(lp) * lp for lp in row),
                mass=sum(math.exp(lp) for lp in row[:k]),
                top_entropy=-sum(p * math.log(p) for p in share),
                **{
                    name: case.inputs[field].reshape(-1)[i].item()
                    for name, field in (
                        ("advantage", "advantages"),
                        ("old", "old_logprobs"),
                        ("ref", "ref_logprobs"),
                        ("rollout", "rollout_logprobs"),
                    )
                },
            )
        )
    return out


def sequence_case(b=8, t=6, vocab=33, width=3, **options):
    """A case of B sequences of T tokens, with expert prefixes of different lengths."""
    case = make_case(b * t, vocab, width, **options)
    case.hidden = case.hidden.detach().reshape(b, t, width).requires_grad_()
    case.targets = case.targets.reshape(b, t)
    case.inputs = {name: values.reshape(b, t) for name, values in case.inputs.items()}
    shifts = torch.linspace(-0.6, 0.6, b, dtype=torch.float64)[torch.arange(b) * 5 % b]  # ratios of sequences
    case.inputs["old_logprobs"] += shifts[:, None]
    case.inputs["expert_mask"] = torch.arange(t) < (torch.arange(b)[:, None] * 2) % t
    return case


def supervised_everywhere(o, case):
    if o.policy is None:
        case.inputs["expert_mask"] = torch.ones_like(case.inputs["expert_mask"])
    return case


@functools.cache
def differentiated(name, head):
    """(the published loss, and for each parameter some directions with its slope along them), by finite differences."""
    o = (NEW | OLD)[name]
    case = supervised_everywhere(o, sequence_case(seed=3, **HEADS[head]))
    params = [p.detach().clone() for p in case.params()]
    held = rows_of(case, *(params if len(params) > 2 else [*params, None]), o.sed_k)
    expert, active = case.inputs["expert_mask"].reshape(-1), (case.inputs["mask"] & (case.targets != -100)).reshape(-1)

    def value(*params):
        rows = rows_of(case, *(params if len(params) > 2 else [*params, None]), o.sed_k)
        return published(o, rows, held, expert, case.targets.shape, active)

    step, g, slopes = 1e-5, torch.Generator().manual_seed(0), []
    for i, parameter in enumerate(params):
        for _ in range(2):
            direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)

            def moved(by, i=i, direction=direction):
                return value(*(p + by * direction if j == i else p for j, p in enumerate(params)))

            slope = (8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))) / (12 * step)
            slopes.append((i, direction, slope))
    return value(*params), slopes


def terms_heads_and_backends():
    """All; where a row takes 10 ms, the head with options is in the slow suite, as test_conformance.py has it."""
    for name, head, backend in product(NEW | OLD, ("plain", "all"), BACKENDS):
        marks = [pytest.mark.slow] if slow(backend) and head == "all" else []
        yield pytest.param(name, head, backend, marks=marks, id=f"{name}-{head}-{backend}")


@pytest.mark.parametrize(("name", "head", "backend"), terms_heads_and_backends())
def test_loss_and_gradients_are_those_of_the_published_formula(name, head, backend):
    o = (NEW | OLD)[name]
    case = supervised_everywhere(o, sequence_case(seed=3, **HEADS[head]))
    value, slopes = differentiated(name, head)
    out = policy_loss(case, o, backend)
    assert out.loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12)
    grads = torch.autograd.grad(out.loss, case.params())
    assert {i for i, _, _ in slopes} == set(range(len(grads)))
    for i, direction, slope in slopes:
        assert (grads[i] * direction).sum().item() == pytest.approx(slope, rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("name", NEW)
def test_every_branch_of_the_formula_happens_in_the_cases(name):
    """The test above would be idle otherwise: masses on both sides of τ, advantages of both signs, clips that bite."""
    o = NEW[name]
    case = supervised_everywhere(o, sequence_case(seed=3))
    held = rows_of(case, case.hidden.detach(), case.weight.detach(), None, o.sed_k)
    expert = case.inputs["expert_mask"].reshape(-1)
    assert {row.advantage > 0 for row in held} == {True, False}
    if o.expert == "sed":
        assert {row.mass < o.sed_tau for row in held} == {True, False}
    if o.expert == "pear":
        steps = [row.lp - row.old for row, e in zip(held, expert, strict=True) if e]
        assert min(steps) < -0.08
        assert max(steps) > 0.3
    if o.policy in ("gspo", "cispo"):
        metrics = policy_loss(case, o, "reference").metrics
        assert metrics["clip_high"] > 0
        assert o.clip_low is None or metrics["clip_low"] > 0


@backends
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_asft_is_dft_with_a_kl_to_the_reference_over_the_whole_vocabulary(reduction, head, backend):
    case = sequence_case(seed=3, **HEADS[head])
    o = Objective(expert="asft", policy="clip", asft_kl=0.3, expert_coef=0.7, entropy_coef=0.01, reduction=reduction)
    g = torch.Generator().manual_seed(1)
    ref_hidden = torch.randn(8, 6, 5, generator=g, dtype=torch.float64)
    ref_weight = torch.randn(33, 5, generator=g, dtype=torch.float64)

    def log_softmax(hidden, weight, bias):
        z = (hidden @ weight.T + (0 if bias is None else bias)) * case.head.get("logit_scale", 1.0)
        if case.head.get("softcap"):
            z = case.head["softcap"] * torch.tanh(z / case.head["softcap"])
        return (z / case.head.get("temperature", 1.0)).log_softmax(-1)

    log_pi, log_ref = log_softmax(case.hidden, case.weight, case.bias), log_softmax(ref_hidden, ref_weight, None)
    lp = log_pi.gather(-1, case.targets.clamp(min=0)[..., None]).squeeze(-1)
    kl = (log_ref.exp() * (log_ref - log_pi)).sum(-1)
    expert, advantages = case.inputs["expert_mask"], case.inputs["advantages"]
    own = -(lp - case.inputs["old_logprobs"]).exp() * advantages
    token = torch.where(expert, 0.7 * (-lp.detach().exp() * lp + 0.3 * kl), own)
    token = token + 0.01 * (log_pi.exp() * log_pi).sum(-1)
    active = case.inputs["mask"] & (case.targets != -100)
    if reduction == "token_mean":
        expected = (token * active).sum() / active.sum()
    else:
        expected = ((token * active).sum(1) / active.sum(1)).mean()
    out = policy_loss(case, o, backend, ref_hidden=ref_hidden, ref_weight=ref_weight)
    assert_close(out.loss, expected, 1e-11, "loss")
    assert_close(out.metrics["loss"], expected, 1e-11, "metric")
    grads = torch.autograd.grad(out.loss, case.params())
    for a, b in zip(grads, torch.autograd.grad(expected, case.params()), strict=True):
        assert_close(a, b, 1e-11, "gradient")
    assert "4 GEMMs: student's and reference's logits" in o.explain()
    with pytest.raises(ValueError, match=r"^linear_policy_loss: ref_hidden must be a tensor, which expert="):
        policy_loss(case, o, backend)


# Backends --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", NEW)
def test_new_terms_agree_with_the_oracle_in_every_dtype(name, dtype, backend):
    o = NEW[name]
    case = sequence_case(b=8, t=20, vocab=257, width=16, dtype=dtype, seed=1)
    if o.expert == "sed":
        o = Objective.sed(sed_k=5, sed_tau=10.0)  # a rounded mass may fall on the other side of τ
    if o.policy == "gspo":
        case.inputs["old_logprobs"] = None  # as may a sequence's ratio of its bounds
    assert_same_result(run(case, o, backend), oracle(case, o), dtype)


@backends
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["sed", "lco_logcosh", "eaft+gspo+all", "lco+cispo"])
def test_new_terms_under_every_head_and_a_small_budget(name, head, backend):
    case = sequence_case(b=6, t=9, vocab=61, seed=2, **HEADS[head])
    with tk.budget_mb(0.005):
        actual = run(case, NEW[name], backend)
    assert_same_result(actual, oracle(case, NEW[name]), torch.float64)


@backends
@pytest.mark.parametrize("name", ["lco_mse", "lco+cispo", "eaft"])
def test_new_terms_from_logits(name, backend):
    case = sequence_case(b=4, seed=4)
    z = (case.hidden @ case.weight.T).detach()

    def both(backend):
        logits = z.clone().requires_grad_()
        out = tk.policy_loss_from_logits(logits, case.targets, NEW[name], backend=backend, **case.inputs)
        return out.loss, *torch.autograd.grad(out.loss, logits)

    for a, b in zip(both(backend), both("reference"), strict=True):
        assert_close(a, b, 1e-11, name)


def lco_gradient(case, backend):
    logits = (case.hidden.detach() @ case.weight.detach().T).requires_grad_()
    o = Objective.lco("mse", lco_beta=2.0, reduction="sum")
    loss = tk.policy_loss_from_logits(
        logits, case.targets, o, advantages=case.inputs["advantages"], backend=backend
    ).loss
    return torch.autograd.grad(loss, logits)[0]


@backends
def test_lco_moves_the_logit_of_the_target_and_no_other(backend):
    case = sequence_case(seed=5)
    grad, a = lco_gradient(case, backend), case.inputs["advantages"]
    expected = torch.zeros_like(grad)
    expected.scatter_(-1, case.targets.clamp(min=0)[..., None], (-2 * a / 2.0)[..., None])
    expected[case.targets == -100] = 0
    assert_close(grad, expected, 1e-12, "d_logits")


@backends
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_lco_kld_has_the_gradient_of_a_divergence_from_the_moved_distribution(beta, backend):
    """Of the authors' form: F.kl_div to softmax(log π_old + A/β e_y), where the old policy is the policy."""
    logits = (2 * torch.randn(12, 33, dtype=torch.float64)).requires_grad_()
    targets, advantages = torch.randint(0, 33, (12,)), torch.randn(12, dtype=torch.float64)
    advantages[0] = 0
    o = Objective.lco("kld", lco_beta=beta, lco_neg=1.0, reduction="sum")
    loss = tk.policy_loss_from_logits(logits, targets, o, advantages=advantages, backend=backend).loss
    (found,) = torch.autograd.grad(loss, logits)
    moved = logits.detach().clone()
    moved[torch.arange(12), targets] += advantages / beta
    log_q = moved.log_softmax(-1)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), log_q, reduction="sum", log_target=True)
    assert_close(found, torch.autograd.grad(expected, logits)[0], 1e-12, "d_logits")
    assert (found[0] == 0).all()


def test_lco_kld_moves_less_the_nearer_the_target_is():
    """Over several updates on one batch the old policy stays: at p = q nothing is left to learn."""
    o, old = Objective.lco("kld", lco_beta=1.0, lco_neg=1.0), torch.tensor(0.2, dtype=torch.float64)
    q = 0.2 * math.e / (0.8 + 0.2 * math.e)
    p = torch.tensor([0.2, 0.3, q], dtype=torch.float64)
    tokens = tk.Tokens(
        p.log(), p, torch.ones(3, dtype=torch.bool), advantages=torch.ones(3).double(), old_logprobs=old.log().expand(3)
    )
    slope = o.all_slopes(tokens).logprobs * (1 - p)
    assert slope[0] < slope[1] < 0
    assert abs(slope[2]) < 1e-12


def test_pears_blocks_end_at_tokens_and_at_whole_sequences():
    n, generator = 40, torch.Generator().manual_seed(0)
    logprobs, old = -torch.rand(2, n, generator=generator, dtype=torch.float64)
    expert = torch.rand(n, generator=generator) < 0.7
    rows = tk.Sequences(torch.arange(n) // 17, 3)
    tokens = tk.Tokens(logprobs, torch.zeros(n), expert, old_logprobs=old, sequences=rows)

    def weights(**fields):
        return -Objective.pear(pear_gamma=0.9, **fields).slopes(tokens)[0][expert]

    assert_close(weights(pear_level="block", pear_block=1), weights(), 1e-12, "blocks of one token")
    nothing_later = weights(pear_level="block", pear_block=n)
    assert_close(nothing_later, torch.ones_like(nothing_later), 1e-12, "one block")
    whole = weights(pear_level="sequence")
    for row in range(3):
        of_row = expert & (rows.row == row)
        expected = (logprobs - old).clamp(-0.08, 0.3)[of_row].sum().exp()
        assert_close(whole[rows.row[expert] == row], expected.expand(int(of_row.sum())), 1e-12, "sequence")


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("ratio", [-0.3, 0.3, 0.05])
def test_pear_is_finite_on_long_sequences(ratio, level):
    n = 8192
    logprobs = torch.full((n,), -1.0, requires_grad=True)
    tokens = tk.Tokens(
        logprobs, torch.zeros(n), torch.ones(n, dtype=torch.bool), old_logprobs=torch.full((n,), -1.0 - ratio),
        sequences=tk.Sequences.of_rows(1, n),
    )  # fmt: skip
    loss = Objective.pear(pear_level=level).losses(tokens)["expert"]
    loss.sum().backward()
    assert loss.isfinite().all()
    weight = -logprobs.grad
    assert weight.min() >= math.exp(-10) * (1 - 1e-6)
    assert weight.max() <= math.exp(5) * (1 + 1e-6)


@backends
def test_an_impossible_target_is_finite_or_honestly_infinite_under_the_new_terms(backend):
    case = sequence_case(b=3, t=4, vocab=33, dtype=torch.float32, with_bias=True)
    case.targets[:, :2] = 5
    with torch.no_grad():
        case.bias[5] = -torch.inf
    for name in ("chord", "cispo", "sapo", "lco_mse", "lco+cispo"):
        out = run(case, NEW[name], backend)
        assert torch.isfinite(out.loss), name
        assert all(torch.isfinite(g).all() for g in out.grads), name
    assert run(case, Objective.eaft(), backend, expert_mask=None).loss == torch.inf


# Sequences and reductions ----------------------------------------------------------------------------------------


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


# Cost, said and counted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", STREAMED)
def test_a_coupled_objective_takes_the_two_passes_it_announces_and_others_one(backend):
    case = sequence_case(b=4, t=8, vocab=257, dtype=torch.float32)
    case.targets.clamp_(min=0)
    case.inputs = {n: v for n, v in case.inputs.items() if n in ("advantages", "old_logprobs")}
    case.inputs["advantages"] = torch.ones(4)
    for objective, count in (
        (Objective.gspo(clip_low=None, clip_high=None), 4),
        (Objective.cispo(entropy_coef=0.1), 3),
    ):

        def step(objective=objective):
            policy_loss(case, objective, backend).loss.backward()

        assert gemms(step, case) == count
        assert f"{count} GEMMs" in objective.explain()


def test_an_objective_explains_itself():
    text = Objective.gspo(kl_coef=0.1, tis_cap=2.0).explain()
    for part in ("two passes, because policy='gspo'", "ref_logprobs", "rollout_logprobs", "[B, T]", "sequences"):
        assert part in text, text
    text = Objective.trapo().explain()
    assert "single pass" in text
    assert "arXiv 2512.17636" in text
    assert "old_logprobs used where given" in text
    assert "top20_entropy, one more pass" in Objective.eaft().explain()
    assert "divisor" in Objective.dr_grpo(reduction="sum").explain()


def test_presets_of_new_terms_are_the_published_ones():
    assert (Objective.gspo().clip_low, Objective.gspo().clip_high, Objective.gspo().reduction) == (
        3e-4,
        4e-4,
        "sequence_mean",
    )
    assert (Objective.chord(0.3).expert_coef, Objective.chord(0.3).policy_coef, Objective.chord(0.3).policy) == (
        0.3,
        0.7,
        "clip",
    )
    assert (Objective().pear_low, Objective().pear_high, Objective().sapo_tau_pos, Objective().sapo_tau_neg) == (
        -0.08,
        0.3,
        1.0,
        1.05,
    )
    assert (Objective().pear_gamma, Objective().pear_floor, Objective().pear_ceil) == (0.999, -10, 5)
    assert Objective.sapo().reduction == "sequence_mean"
    assert (Objective.lco().lco_neg, Objective.lco("kld").lco_beta, Objective.lco("kld").lco_neg) == (1.0, 0.1, 100.0)
    with pytest.raises(ValueError, match=r"^Objective.chord: mu must be a number in \[0, 1\]; got 2"):
        Objective.chord(2)
