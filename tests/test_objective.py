"""The terms: slopes are the derivatives of values, fields are validated, presets are the published losses."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import EVERYTHING, OBJECTIVES

import trapo_kernels as tk

TERMS = {
    **{f"expert-{name}": tk.Objective(expert=name, policy=None) for name in tk.EXPERT_TERMS},
    **{f"policy-{name}": tk.Objective(expert=None, policy=name) for name in tk.POLICY_TERMS},
    **OBJECTIVES,
}


def make_tokens(seed, n=64, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def random():
        return torch.rand(n, generator=g, dtype=dtype)

    logprobs = random().log()
    old = logprobs - 1.5 * torch.randn(n, generator=g, dtype=dtype)
    return tk.Tokens(
        logprobs=logprobs,
        entropy=3 * random(),
        expert=random() < 0.4,
        advantages=(4 * random() - 2) * (random() < 0.8),
        old_logprobs=old,
        ref_logprobs=logprobs + torch.randn(n, generator=g, dtype=dtype),
        rollout_logprobs=old + 0.5 * torch.randn(n, generator=g, dtype=dtype),
        target_logits=5 * random() - 2,
        statistics={"top20_mass": random(), "top20_entropy": 3 * random()},
        sequences=tk.Sequences.of_rows(n // 8, 8),
    )


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("on_policy", [False, True])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_slopes_are_the_derivatives_of_the_values(name, on_policy, seed):
    o, t = TERMS[name], make_tokens(seed)
    if on_policy:
        t = replace(t, old_logprobs=None)
    inputs = [x.clone().requires_grad_() for x in (t.logprobs, t.entropy, t.target_logits)]
    live = replace(t, **dict(zip(("logprobs", "entropy", "target_logits"), inputs, strict=True)))
    value = sum(part.sum() for part in o.losses(live).values())
    by_autograd = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    slopes = o.all_slopes(t)
    for slope, expected in zip(slopes, by_autograd, strict=True):
        actual = torch.zeros(64, dtype=torch.float64) if slope is None else slope
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert (slopes.entropy is None) == (o.entropy_coef == 0)
    assert (slopes.target_logits is None) == (not o.reads_logit)
    assert o.slopes(t)[1] is slopes.entropy is None or torch.equal(o.slopes(t)[0], slopes.logprobs)


@pytest.mark.parametrize("name", TERMS)
def test_slopes_and_values_at_probability_zero_are_finite_or_honestly_infinite(name):
    o, t = TERMS[name], make_tokens(0)
    t = replace(t, logprobs=torch.full_like(t.logprobs, -torch.inf), ref_logprobs=t.ref_logprobs)
    for old in (None, t.old_logprobs, t.logprobs):
        given_old = replace(t, old_logprobs=old)
        total = sum(o.losses(given_old).values())
        slope, _ = o.slopes(given_old)
        # KL(q ‖ π) is infinite where q, made from the old policy, is above the zero of π.
        above = o.expert == "lco_kld" and old is t.old_logprobs
        infinite = (t.expert & (above or o.expert in ("sft", "sed", "eaft", "pear"))) | (~t.expert & (o.kl_coef != 0))
        weighted = t.expert & (o.expert == "weighted")  # by an advantage: of its sign
        infinite = infinite | (weighted & (t.advantages != 0))
        if o.tis_cap is None or old is t.old_logprobs:
            assert torch.isfinite(total[~infinite]).all()
            assert torch.isfinite(slope[~(~t.expert & (o.kl_coef != 0))]).all()
            sign = torch.where(weighted, t.advantages.sign(), 1)
            assert (total[infinite] == torch.inf * sign[infinite]).all()


@pytest.mark.parametrize("name", TERMS)
def test_tokens_declared_without_gradient_have_none_and_the_others_may(name):
    o, t = TERMS[name], make_tokens(3)
    live = o.has_gradient(t.expert, t.advantages)
    g_lp, g_entropy, g_logit = o.all_slopes(t)
    assert not g_lp[~live].any()
    assert g_entropy is None or live.all()
    assert g_logit is None or not g_logit[~live].any()
    # A far ratio shuts SAPO's gate to exactly 0.
    if o.entropy_coef == 0 and o.kl_coef == 0 and o.clip_low is None and o.policy != "sapo":
        assert (g_lp if g_logit is None else g_logit)[live].all()


def test_nan_in_a_token_stays_in_that_token():
    t = make_tokens(1)
    logprobs = t.logprobs.clone()
    logprobs[5] = torch.nan
    total = sum(EVERYTHING.losses(replace(t, logprobs=logprobs)).values())
    slope, _ = EVERYTHING.slopes(replace(t, logprobs=logprobs))
    assert total.isnan().nonzero().flatten().tolist() == slope.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"expert": "trfst"},
            "Objective: expert must be one of 'sft', 'trsft', 'dft', 'luffy', 'weighted', 'chord', 'sed', 'eaft', "
            "'asft', 'pear', 'lco_mse', 'lco_logcosh', 'lco_kld', a function or None; got 'trfst'",
        ),
        (
            {"policy": "ppo"},
            "Objective: policy must be one of 'unclipped', 'clip', 'gspo', 'cispo', "
            "'dppo_tv', 'dppo_kl', 'sapo', a function or None; "
            "got 'ppo'",
        ),
        (
            {"reduction": "mean"},
            "Objective: reduction must be one of 'token_mean', 'region_mean', 'sequence_mean', 'sum'; got 'mean'",
        ),
        ({"policy_coef": -1.0}, "Objective: policy_coef must be a number at least 0; got -1.0"),
        ({"sed_k": 2.5}, "Objective: sed_k must be a number that is whole and above 0; got 2.5"),
        ({"lco_beta": 0}, "Objective: lco_beta must be a number above 0; got 0"),
        (
            {"policy": "cispo", "dual_clip": 3.0},
            "Objective: dual_clip must be None unless policy='clip'; got policy='cispo'",
        ),
        ({"alpha": 0.0}, "Objective: alpha must be a number in (0, 1]; got 0.0"),
        ({"alpha": None}, "Objective: alpha must be a number in (0, 1]; got None"),
        ({"alpha": "0.1"}, "Objective: alpha must be a number in (0, 1]; got '0.1'"),
        ({"expert_coef": -1}, "Objective: expert_coef must be a number at least 0; got -1"),
        ({"clip_low": 1.5}, "Objective: clip_low must be a number in [0, 1] or None; got 1.5"),
        ({"clip_high": -0.1}, "Objective: clip_high must be a number at least 0 or None; got -0.1"),
        ({"dual_clip": 1.0}, "Objective: dual_clip must be a number above 1 or None; got 1.0"),
        ({"entropy_coef": float("nan")}, "Objective: entropy_coef must be a number that is finite; got nan"),
        ({"kl_coef": -0.1}, "Objective: kl_coef must be a number at least 0; got -0.1"),
        ({"tis_cap": 0}, "Objective: tis_cap must be a number above 0 or None; got 0"),
        ({"luffy_gamma": 0}, "Objective: luffy_gamma must be a number above 0; got 0"),
        (
            {"policy": "unclipped", "clip_low": 0.2},
            "Objective: clip_low must be None unless policy='clip' or policy='gspo' or policy='cispo' or "
            "policy='dppo_tv' or policy='dppo_kl'; got policy='unclipped'",
        ),
        (
            {"policy": None, "tis_cap": 2.0},
            "Objective: tis_cap must be None unless there is a policy term; got policy=None",
        ),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        tk.Objective(**fields)
    assert str(error.value) == message


def test_presets_are_the_published_losses_and_take_overrides():
    assert tk.Objective.trapo() == tk.Objective(expert="trsft", alpha=0.1, policy="clip")
    assert tk.Objective.trapo(alpha=0.2).alpha == 0.2
    grpo = tk.Objective.grpo()
    assert (grpo.expert, grpo.clip_low, grpo.clip_high) == (None, 0.2, 0.2)
    assert tk.Objective.dr_grpo() == grpo
    assert (tk.Objective.dapo().clip_low, tk.Objective.dapo().clip_high) == (0.2, 0.28)
    assert tk.Objective.sft().policy is tk.Objective.dft().policy is None
    assert tk.Objective.luffy().luffy_gamma == 0.1
    for preset in OBJECTIVES.values():
        assert hash(preset) == hash(replace(preset))


def test_an_objective_is_frozen_and_says_what_it_needs():
    with pytest.raises(FrozenInstanceError):
        tk.Objective().alpha = 0.3
    assert tk.Objective.sft().needs == {}
    assert tk.Objective.trapo().needs == {"advantages": "policy='clip'"}
    assert tk.Objective.trapo().reads == {"advantages", "old_logprobs"}
    assert set(EVERYTHING.needs) == {"advantages", "ref_logprobs", "rollout_logprobs"}
    assert tk.Objective(expert="luffy", policy=None).needs == {"advantages": "expert='luffy'"}
    assert tk.Objective(policy=None, expert="luffy", expert_coef=0.0).needs == {}


def test_every_term_names_its_source():
    for term in (*tk.EXPERT_TERMS.values(), *tk.POLICY_TERMS.values()):
        assert term.source


def test_a_new_term_is_one_entry_in_one_place(monkeypatch):
    """−sg(p(1−p)) log p as an entry of another name; it then runs on every backend."""
    from kernel_cases import BACKENDS, assert_same_result, make_case, oracle, run

    def weight(t):
        return (t.logprobs.exp() * -torch.expm1(t.logprobs)).detach()

    chord = tk.Term(lambda o, t: -weight(t) * t.logprobs, lambda o, t: -weight(t), source="CHORD")
    monkeypatch.setitem(tk.EXPERT_TERMS, "mine", chord)
    o, case = tk.Objective(expert="mine", policy=None), make_case(30, 33)
    expected = oracle(case, o)
    assert expected.grads[0].any()
    for backend in BACKENDS:
        assert_same_result(run(case, o, backend), expected, torch.float64)


# Another value of each field than the default, which changes the loss of a term that reads it.
OTHER = {
    "alpha": 0.9,
    "expert_coef": 0.5,
    "policy_coef": 0.5,
    "clip_low": 0.003,
    "clip_high": 0.003,
    "dual_clip": 1.5,
    "entropy_coef": 0.1,
    "kl_coef": 0.1,
    "tis_cap": 0.5,
    "tis_low": 1.8,
    "tis_mode": "mask",
    "tis_level": "sequence",
    "off_policy_mask": 0.05,
    "dppo_cap": 0.3,
    "reduction": "sequence_mean",
    "luffy_gamma": 0.7,
    "sed_coef": 3.0,
    "sed_k": 45,
    "sed_tau": 0.2,
    "eaft_power": 2.0,
    "asft_kl": 0.5,
    "pear_gamma": 0.5,
    "pear_low": -1.0,
    "pear_high": 1.0,
    "pear_floor": 0.5,
    "pear_ceil": -0.1,
    "pear_level": "block",
    "pear_block": 2,
    "lco_beta": 0.3,
    "lco_neg": 0.3,
    "sapo_tau_pos": 0.3,
    "sapo_tau_neg": 0.3,
}


def loss_of(o):
    g = torch.Generator().manual_seed(0)
    hidden, weight, ref = (0.6 * torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (64, 60, 64))
    targets, sequences = torch.randint(0, 60, (64,), generator=g), torch.arange(64) // 9
    off = torch.randn(64, generator=g, dtype=torch.float64) + (sequences - 3) / 2  # whole sequences too, for GSPO
    old = tk.linear_logprobs(hidden, weight, targets).logprobs + off
    head = {"ref_hidden": ref, "ref_weight": weight} if o.reference_head else {}
    return tk.linear_policy_loss(
        hidden,
        weight,
        targets,
        o,
        advantages=torch.randn(64, generator=g, dtype=torch.float64),
        old_logprobs=old,
        ref_logprobs=old.flip(0) if o.kl_coef else None,
        rollout_logprobs=old - 0.4 - 0.6 * (torch.arange(64) % 2) + 3.0 * (sequences > 5) if o.tis_cap else None,
        expert_mask=torch.arange(64) % 3 == 0,
        sequence_ids=sequences,
        backend="reference",
        **head,
    ).loss.item()


@pytest.mark.parametrize("name", TERMS)
def test_the_effective_fields_are_those_that_change_the_loss(name):
    o = TERMS[name]
    before = loss_of(o)
    for field, value in OTHER.items():
        try:
            changed = replace(o, **{field: value if getattr(o, field) != value else 2 * value})
        except ValueError:  # a bound of another term's, a cap without a term: refused, not ignored
            assert field not in o.effective
            continue
        assert (loss_of(changed) != before) == (field in o.effective), field
    assert {"expert", "policy"} <= o.effective
    assert set(OTHER) | {"expert", "policy"} == {f.name for f in fields(tk.Objective)}
