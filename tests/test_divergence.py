"""Divergences between two heads: against torch.distributions in float64, hostile inputs, memory, work."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, TOLERANCE, assert_close, gemms, memory
from torch.distributions import Categorical, kl_divergence

import trapo_kernels as tk

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed")
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", ["torch", "reference"])


class Pair:
    """A student and a reference of another width, with a mask and weights, some of them zero."""

    def __init__(self, n=30, vocab=67, dtype=torch.float64, seed=0, biases=True):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.params = [normal(n, 12), normal(vocab, 12) / 3, normal(vocab)][: 3 if biases else 2]
        self.ref = [normal(n, 20), normal(vocab, 20) / 4, normal(vocab)]
        self.mask = torch.rand(n, generator=g) < 0.8
        self.weights = torch.rand(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) < 0.7)

    def double(self):
        other = Pair(biases=len(self.params) > 2)
        other.params, other.ref = [p.double() for p in self.params], [p.double() for p in self.ref]
        other.mask, other.weights = self.mask, self.weights
        return other

    def run(self, backend, kind="forward_kl", **options):
        params = [p.detach().clone().requires_grad_() for p in self.params]
        out = tk.linear_divergence(
            params[0], params[1], self.ref[0], self.ref[1], bias=params[2] if len(params) > 2 else None,
            ref_bias=self.ref[2], kind=kind, backend=backend,
            **{"mask": self.mask, "weights": self.weights, **options},
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss, params)


def plain(pair, kind, beta=0.5, temperature=1.0, softcap=None, ref_softcap=None):
    """The divergence of each token by torch.distributions."""

    def distribution(hidden, weight, bias, cap):
        z = hidden @ weight.T + bias
        return Categorical(logits=(z if cap is None else cap * torch.tanh(z / cap)) / temperature)

    p, q = distribution(*pair.ref, ref_softcap), distribution(*pair.params, softcap)
    if kind == "forward_kl":
        return kl_divergence(p, q)
    if kind == "reverse_kl":
        return kl_divergence(q, p)
    if kind == "mixed":
        return beta * kl_divergence(p, q) + (1 - beta) * kl_divergence(q, p)
    m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


def same(actual, expected, dtype, floor=1e-3):
    (out, grads), (right, right_grads) = actual, expected
    assert_close(out.loss, right.loss, TOLERANCE[dtype], "loss", floor=1.0)
    assert_close(out.tokens, right.tokens, TOLERANCE[dtype], "tokens", floor=1.0)
    for a, b in zip(grads, right_grads, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, TOLERANCE[dtype], "gradient", floor)


@kinds
@backends
def test_values_are_those_of_torch_distributions(backend, kind):
    pair = Pair()
    for options in ({}, {"beta": 0.2}, {"temperature": 2.0, "softcap": 3.0}):
        caps = {"ref_softcap": options.get("softcap")}
        out, _ = pair.run(backend, kind, **options)
        expected = plain(pair, kind, **options, **caps).masked_fill(~pair.mask, 0)
        counted = pair.mask & (pair.weights != 0)
        assert_close(out.tokens[counted], expected[counted], 1e-11, "tokens")
        assert_close(out.loss, (pair.weights * expected).sum() / pair.mask.sum(), 1e-11, "loss")
    out, _ = pair.run(backend, kind, softcap=3.0, ref_options={"softcap": None}, normalizer=7)
    expected = plain(pair, kind, softcap=3.0).masked_fill(~pair.mask, 0)
    assert_close(out.loss, (pair.weights * expected).sum() / 7, 1e-11, "loss")


@kinds
@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("n", "vocab"), [(0, 5), (1, 1), (7, 2), (60, 257)])
def test_loss_and_gradients_agree_with_the_oracle(n, vocab, dtype, backend, kind):
    pair = Pair(n, vocab, dtype)
    with tk.budget_mb(0.05):
        # π − p of two classes nearly cancels: its unit is that of a rounded π, over the normalizer.
        floor = 0.02 if vocab == 2 else 1e-3
        same(pair.run(backend, kind), pair.double().run("reference", kind), dtype, floor)


@kinds
@backends
def test_gradcheck_under_every_head_option(backend, kind):
    pair = Pair(5, 6)
    for options in ({}, {"temperature": 0.6, "softcap": 2.0, "logit_scale": 1.5}):

        def loss(hidden, weight, bias, options=options):
            return tk.linear_divergence(
                hidden, weight, pair.ref[0], pair.ref[1], bias=bias, ref_bias=pair.ref[2], kind=kind, beta=0.3,
                backend=backend, weights=pair.weights, **options,
            ).loss  # fmt: skip

        assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in pair.params])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 30), vocab=st.integers(1, 50), seed=st.integers(0, 2**20), kind=st.sampled_from(KINDS),
    kilobytes=st.floats(0.1, 500),
)  # fmt: skip
def test_any_small_problem_agrees_with_the_oracle(n, vocab, seed, kind, kilobytes):
    pair = Pair(n, vocab, seed=seed)
    with tk.budget_mb(kilobytes / 1024):
        same(pair.run("torch", kind), pair.run("reference", kind), torch.float64)


@kinds
@backends
def test_a_student_that_is_the_reference_has_no_divergence_and_no_gradient(backend, kind):
    pair = Pair()
    pair.ref = [p.clone() for p in pair.params]
    out, grads = pair.run(backend, kind)
    assert out.tokens.abs().max() < 1e-14
    assert all(g.abs().max() < 1e-13 for g in grads)


@backends
def test_impossible_classes_are_left_out_or_honestly_infinite(backend):
    pair = Pair(dtype=torch.float32)
    pair.weights = torch.ones(30)
    pair.ref[2][3] = -torch.inf  # the reference never, the student perhaps
    for kind, finite in (("forward_kl", True), ("reverse_kl", False), ("jsd", True)):
        out, grads = pair.run(backend, kind)
        assert torch.isfinite(out.loss) == finite, kind
        if finite:
            same((out, grads), pair.double().run("reference", kind), torch.float32)
    pair.params[2][3] = -torch.inf  # neither
    for kind in KINDS:
        out, grads = pair.run(backend, kind)
        assert torch.isfinite(out.loss)
        assert not grads[1][3].any()
        same((out, grads), pair.double().run("reference", kind), torch.float32)
    pair.ref[2][3] = 0.0  # the student never
    assert pair.run(backend, "forward_kl")[0].loss == torch.inf
    assert torch.isfinite(pair.run(backend, "jsd")[0].loss)


@kinds
@backends
def test_a_token_without_weight_adds_nothing_where_its_divergence_is_infinite(backend, kind):
    pair = Pair()
    pair.mask, pair.weights = None, torch.ones(30, dtype=torch.float64)
    pair.weights[:10] = 0
    pair.params[2][3] = pair.ref[2][4] = -torch.inf  # each can say a class that the other cannot
    infinite = {"forward_kl": 3, "reverse_kl": 4, "jsd": None, "mixed": 3}[kind]
    out, grads = pair.run(backend, kind)
    assert (out.tokens == torch.inf).all() == (infinite is not None)
    assert out.loss == torch.inf or kind == "jsd"
    pair.weights.zero_()
    out, grads = pair.run(backend, kind)
    assert out.loss == 0
    assert not any(g.any() for g in grads)
    # Half of the tokens, and the classes possible for all of those that count.
    pair.params[2][3] = pair.ref[2][4] = 0
    pair.weights[10:] = 1
    alone, expected = pair.run(backend, kind)
    with torch.no_grad():
        pair.ref[0][:10] *= torch.inf  # NaN or infinite logits
    out, grads = pair.run(backend, kind)
    assert_close(out.loss, alone.loss, 1e-12, "loss")
    for a, b in zip(grads, expected, strict=True):
        assert_close(a, b, 1e-12, "gradient")


@kinds
@backends
def test_huge_logits_and_padding_do_no_harm(backend, kind):
    pair = Pair()
    for t in (*pair.params, *pair.ref):
        t.mul_(60).round_()
    same(pair.run(backend, kind), pair.run("reference", kind), torch.float64)
    clean, grads = pair.run(backend, kind)
    for t in (pair.params[0], pair.ref[0]):
        t[~pair.mask] = torch.nan
    pair.weights[~pair.mask] = torch.nan
    out, found = pair.run(backend, kind)
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], grads[1:], strict=True))


def test_the_reference_is_frozen_and_a_second_backward_is_right():
    pair = Pair()
    for t in pair.ref:
        t.requires_grad_()
    params = [p.requires_grad_() for p in pair.params]
    out = tk.linear_divergence(*params[:2], *pair.ref[:2], bias=params[2], ref_bias=pair.ref[2], backend="torch")
    first = torch.autograd.grad(out.loss, params, retain_graph=True)
    for a, b in zip(torch.autograd.grad(2 * out.loss, params, retain_graph=True), first, strict=True):
        assert_close(a, 2 * b, 1e-12, "gradient")
    with pytest.raises(RuntimeError, match=r"^linear_divergence: create_graph must be False"):
        torch.autograd.grad(out.loss, params, create_graph=True)
    assert all(t.grad is None for t in pair.ref)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_keep_to_the_budget(dtype, kind):
    pair, budget = Pair(400, 20011, dtype, biases=False), 14
    pair.mask, pair.weights = None, None
    gradients = sum(p.numel() * (p.element_size() + 4) for p in pair.params)
    with tk.budget_mb(budget):
        used = memory(lambda: pair.run("torch", kind))
    assert used.largest < budget * 2**20
    copies = sum(p.numel() * p.element_size() for p in pair.params)
    assert used.peak <= budget * 2**20 + gradients + copies + 400 * 8 * 20 + 400 * 20 * 8
    assert used.peak > 0.5 * budget * 2**20


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind must be one of 'forward_kl', 'reverse_kl', 'jsd', 'mixed'; got 'kl'"),
        ({"beta": 1.0}, ValueError, "beta must be a number in (0, 1); got 1.0"),
        ({"ref_weight": torch.zeros(6, 3)}, ValueError, "ref_weight must have V=7 rows as weight; got 6"),
        ({"ref_hidden": torch.zeros(5, 3)}, ValueError, "ref_hidden must be [4] tokens as hidden; got [5]"),
        (
            {"ref_hidden": torch.zeros(4, 2)},
            ValueError,
            "ref_weight must be [V, D] with V >= 1 and D=2 as in ref_",
        ),
        ({"ref_bias": torch.zeros(6)}, ValueError, "ref_bias must be [V] with V=7; got [6]"),
        ({"weights": torch.zeros(5)}, ValueError, "weights must be [4] as hidden; got [5]"),
        ({"mask": torch.zeros(4)}, TypeError, "mask must be bool; got float32"),
        ({"normalizer": 0}, ValueError, "normalizer must be a number above 0 or a 0-dim tensor; got 0"),
        (
            {"ref_options": {"softcap": -1.0}},
            ValueError,
            "ref_options: softcap must be a finite number above",
        ),
        ({"backend": "cpu"}, ValueError, "backend must be 'torch', 'reference' or None; got 'cpu'"),
    ],
)
def test_wrong_use_is_refused_in_one_line(wrong, kind, message):
    good = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(7, 3)}
    good |= {"ref_hidden": torch.zeros(4, 3), "ref_weight": torch.zeros(7, 3)}
    with pytest.raises(kind, match="^" + re.escape(f"linear_divergence: {message}")):
        tk.linear_divergence(**{**good, **wrong})


# Several references, and logits that exist -------------------------------------------------------------------


@kinds
@backends
def test_several_references_are_the_weighted_sum_of_each(backend, kind):
    first, second = Pair(), Pair(seed=4)
    second.params, second.mask, second.weights = first.params, first.mask, first.weights
    names = ("ref_hidden", "ref_weight", "ref_bias")
    refs = {name: [a, b] for name, a, b in zip(names, first.ref, second.ref, strict=True)}
    params = [p.detach().clone().requires_grad_() for p in first.params]
    for shares, wanted in ((None, (0.5, 0.5)), ([0.3, 2.0], (0.3, 2.0))):
        with tk.budget_mb(0.05):
            out = tk.linear_divergence(
                params[0], params[1], **refs, ref_shares=shares, bias=params[2], kind=kind, backend=backend,
                mask=first.mask, weights=first.weights,
            )  # fmt: skip
        found = out, torch.autograd.grad(out.loss, params)
        each = [pair.run("reference", kind) for pair in (first, second)]
        of_each = zip(*([o.loss, o.tokens, *g] for o, g in each), strict=True)
        mixed = [wanted[0] * a + wanted[1] * b for a, b in of_each]
        same(found, (tk.Divergence(mixed[0], mixed[1]), mixed[2:]), torch.float64)


@kinds
@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_a_reference_that_exist_do_as_well_as_its_head(backend, kind, dtype):
    pair = Pair()
    logits = pair.ref[0] @ pair.ref[1].T + pair.ref[2]
    params = [p.detach().clone().requires_grad_() for p in pair.params]
    given = logits.to(dtype) if dtype != torch.float64 else logits.log_softmax(-1)
    out = tk.linear_divergence(
        params[0], params[1], ref_logits=given, bias=params[2], kind=kind, backend=backend, mask=pair.mask,
        weights=pair.weights,
    )  # fmt: skip
    exact = pair if dtype == torch.float64 else None
    if exact is None:  # the rounded logits are the reference: those of an identity over the vocabulary
        exact = Pair()
        exact.ref = [given.double(), torch.eye(67, dtype=torch.float64), None]
    same((out, torch.autograd.grad(out.loss, params)), exact.run("reference", kind), torch.float64)


def test_a_further_reference_costs_a_gemm_and_no_more_memory():
    pair = Pair(64, 3000, torch.float32)
    hidden, weight = (p.detach().requires_grad_() for p in pair.params[:2])
    refs = [hidden.detach().flip(1), hidden.detach()], [weight.detach(), weight.detach().flip(0)]

    class Sizes:
        hidden, weight = pair.params[:2]

    def both():
        return torch.autograd.grad(tk.linear_divergence(hidden, weight, *refs, kind="mixed").loss, (hidden, weight))

    with tk.budget_mb(8):
        assert gemms(both, Sizes) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_several_references_and_logits_are_one_graph(kind):
    pair = Pair(9, 31)
    logits = torch.randn(9, 31, dtype=torch.float64)
    refs = {"ref_hidden": [pair.ref[0], pair.ref[0].flip(0)], "ref_weight": [pair.ref[1], pair.ref[1].flip(0)]}
    params = [p.detach().clone().requires_grad_() for p in pair.params]

    def value(hidden, weight, bias):
        one = tk.linear_divergence(hidden, weight, bias=bias, kind=kind, ref_shares=[0.2, 0.8], **refs).loss
        return one + tk.linear_divergence(hidden, weight, bias=bias, kind=kind, ref_logits=logits).loss

    found, right = torch.compile(value, fullgraph=True, backend="aot_eager")(*params), value(*params)
    assert_close(found, right, 1e-12, "value")
    for a, b in zip(*(torch.autograd.grad(t, params) for t in (found, right)), strict=True):
        assert_close(a, b, 1e-11, "gradient")
