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
    HEADS,
    STREAMED,
    assert_close,
    gemms,
    make_case,
    policy_loss,
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
    "off-policy sequences": Objective.grpo(off_policy_mask=0.1),
    "off-policy sequences, tis": Objective.grpo(off_policy_mask=0.2, tis_cap=1.5),
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


def kept(o, x, own):
    """DeepSeek-V3.2's mask M: 0 where A < 0 and the mean of log π_sampled / π over the response is above δ."""
    if o.off_policy_mask is None or x.advantage >= 0:
        return 1.0
    return float(sum(t.rollout - t.lp for t in own) / len(own) <= o.off_policy_mask)


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
                    weight = importance(o, x, [rows[j] for j in own]) * kept(o, held[i], [held[j] for j in own])
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


def test_the_mask_of_sequences_leaves_some_out_and_keeps_some():
    o = OLD["off-policy sequences"]
    case = sequence_case(seed=3)
    held = rows_of(case, case.hidden.detach(), case.weight.detach(), None, o.sed_k)
    expert = case.inputs["expert_mask"].reshape(-1).tolist()
    rows = [[held[i] for i in range(s, s + 6) if not expert[i]] for s in range(0, 48, 6)]
    assert {kept(o, x, own) for own in rows for x in own if x.advantage < 0} == {0.0, 1.0}


def test_dppo_without_a_cap_has_the_gradient_of_prime_rls_default_loss():
    """prime_rl/trainer/rl/loss.py, default_loss_fn with adv_tau=1 and kl_tau=0: −keep · A · π/μ, whose ratio has the
    gradient; a token counts unless π − μ > 0.2 with A > 0, or π − μ < −0.2 without."""
    g = torch.Generator().manual_seed(0)
    logprobs, engine = (-3 * torch.rand(200, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(200, generator=g, dtype=torch.float64)
    logprobs.requires_grad_()
    moved = logprobs.exp() - engine.exp()
    dropped = torch.where(advantages > 0, moved > 0.2, moved < -0.2)
    want = -((~dropped) * advantages * (logprobs - engine).exp()).mean()
    o = Objective.dppo(dppo_cap=None)
    found = tk.policy_loss_from_logprobs(logprobs, o, advantages=advantages, old_logprobs=engine).loss
    right = torch.autograd.grad(want, logprobs)[0]
    torch.testing.assert_close(torch.autograd.grad(found, logprobs)[0], right)
    assert 20 < int((right == 0).sum()) < 180


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
    assert (Objective.dppo().clip_low, Objective.dppo().clip_high, Objective.dppo("kl").policy) == (0.2, 0.2, "dppo_kl")
    with pytest.raises(ValueError, match=r"^Objective.dppo: divergence must be 'tv' or 'kl'; got 'js'"):
        Objective.dppo("js")
    with pytest.raises(ValueError, match=r"^Objective.chord: mu must be a number in \[0, 1\]; got 2"):
        Objective.chord(2)
