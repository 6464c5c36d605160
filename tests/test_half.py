"""16-bit heads lose nothing that a loss scale, or fp32 sums, would have kept."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EVERYTHING, STREAMED, make_case, oracle, run, slow

import trapo_kernels as tk
from trapo_kernels.chunks import products, sources
from trapo_kernels.chunks.products import power_of_two

backends = pytest.mark.parametrize("backend", STREAMED)
SCALE = 2.0**16


def head(n, vocab, width=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (0.3 * torch.randn(size, width, generator=g) for size in (n, vocab))
    return hidden.half(), weight.half(), torch.randint(0, vocab, (n,), generator=g)


def error(found, wanted):
    """Relative, of the whole; the fp16 gradients that a caller gets are rounded once: 2.1e-4."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]


def loss_gradients(params, targets, objective, backend, **options):
    params = [p.detach().clone().requires_grad_() for p in params]
    hidden, weight = params
    out = tk.linear_policy_loss(hidden, weight, targets, objective, backend=backend, **options)
    return [g.double() / SCALE for g in torch.autograd.grad(out.loss * SCALE, params)]


SMALL = {
    "one long sequence": (tk.Objective.sft(reduction="sequence_mean"), 0.0),
    "an entropy bonus alone": (tk.Objective.grpo(entropy_coef=1e-3), 0.0),
    "small advantages": (tk.Objective.grpo(), 1e-3),
    "tiny advantages": (tk.Objective.grpo(), 1e-6),
    "a divisor in the loss": (tk.Objective.lco(policy="clip", expert_coef=1e-5), 1e-4),
}


@backends
@pytest.mark.parametrize("name", SMALL)
def test_small_slopes_survive_until_the_loss_scale_comes(name, backend):
    objective, advantage = SMALL[name]
    n, vocab = (6, 3000) if slow(backend) or backend == "cuda-on-cpu" else (128, 32000)
    hidden, weight, targets = head(n, vocab)
    # Not all tokens alike, and not of one chunk.
    options = {
        "advantages": advantage * torch.linspace(0.5, 2, n),
        "sequence_ids": torch.zeros(n, dtype=torch.int64),
        "expert_mask": torch.arange(n) % 2 == 0 if objective.expert == "lco_mse" else None,
    }
    wanted = loss_gradients((hidden.double(), weight.double()), targets, objective, "reference", **options)
    with tk.budget_mb(4):
        found = loss_gradients((hidden, weight), targets, objective, backend, **options)
    # Where a gradient times 65,536 is small itself, the caller's fp16 rounds it again.
    assert max(error(found, wanted)) < (1e-3 if advantage != 1e-6 else 5e-3)


@backends
def test_slopes_of_all_sizes_in_one_call(backend):
    n = 8 if slow(backend) or backend == "cuda-on-cpu" else 64
    hidden, weight, targets = head(n, 1000)
    advantages = 10.0 ** torch.linspace(-5, 4, n)  # 10^4 · 65,536 / n is no fp16 number: no loss scale then
    for order in (advantages, advantages.flip(0)):
        options = {"advantages": order, "normalizer": 1e5}

        def rows(params, backend, options=options):
            hidden, weight = (p.detach().clone().requires_grad_() for p in params)
            loss = tk.linear_policy_loss(hidden, weight, targets, tk.Objective.grpo(), backend=backend, **options).loss
            return torch.autograd.grad(loss * 10.0, (hidden, weight))

        wanted = rows((hidden.double(), weight.double()), "reference")
        with tk.budget_mb(0.1):
            found = rows((hidden, weight), backend)
        assert max(error(found, wanted)) < 1e-3


@backends
def test_logprobs_under_a_grad_scaler(backend):
    n = 8 if slow(backend) or backend == "cuda-on-cpu" else 64
    hidden, weight, targets = head(n, 3000)

    def gradients(params, backend):
        params = [p.detach().clone().requires_grad_() for p in params]
        out = tk.linear_logprobs(*params, targets, entropy=True, backend=backend)
        loss = (1e-6 * out.logprobs - 1e-5 * out.entropy).mean()
        return [g.double() / 2.0**24 for g in torch.autograd.grad(loss * 2.0**24, params)]

    wanted = gradients((hidden.double(), weight.double()), "reference")
    assert max(error(gradients((hidden, weight), backend), wanted)) < 1e-3


@backends
def test_a_grad_scaler_trains_fp16_weights_on_a_small_bonus(backend):
    n = 6 if slow(backend) or backend == "cuda-on-cpu" else 64
    hidden, weight, targets = head(n, 3000)
    weight = torch.nn.Parameter(weight.float())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    objective = tk.Objective.grpo(entropy_coef=1e-4)
    out = tk.linear_policy_loss(hidden, weight.half(), targets, objective, advantages=torch.zeros(n), backend=backend)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    exact = weight.detach().half().double().requires_grad_()
    right = tk.linear_policy_loss(
        hidden.double(), exact, targets, objective, advantages=torch.zeros(n), backend="reference"
    ).loss
    (wanted,) = torch.autograd.grad(right, exact)
    assert max(error([weight.grad], [wanted])) < 2e-3
    before = weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_divergence_of_small_weights(kind):
    hidden, weight, _ = head(64, 8000)

    def gradients(params):
        params = [p.detach().clone().requires_grad_() for p in params]
        ref = params[0].detach().flip(1), params[1].detach().flip(0)
        weights = torch.full((64,), 1 / 65536)
        loss = tk.linear_divergence(*params, *ref, kind=kind, weights=weights, normalizer=1.0, backend="torch").loss
        return [g.double() / SCALE for g in torch.autograd.grad(loss * SCALE, params)]

    assert max(error(gradients((hidden, weight)), gradients((hidden.double(), weight.double())))) < 1e-3


def test_gradients_of_given_logits_are_final():
    """Slopes come in with the loss scale: what cannot be represented then no factor could save."""
    torch.manual_seed(0)
    logits, targets = torch.randn(32, 8000).half(), torch.randint(0, 8000, (32,))

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        loss = tk.policy_loss_from_logits(
            logits, targets, tk.Objective.grpo(entropy_coef=1e-3), advantages=torch.full((32,), 1e-3)
        ).loss
        return [torch.autograd.grad(loss * SCALE * 32, logits)[0].double()]

    wanted = gradient(logits.double())
    assert max(error(gradient(logits), [w.half().double() for w in wanted])) < 2e-3


@pytest.mark.parametrize("size", [0.0, 1e-38, 3e-20, 6e-8, 1e-3, 0.5, 1.0, 1.5, 2.0**12, 65504.0, 3e30])
def test_the_factor_is_a_power_of_two_that_brings_a_number_just_below_two_to_the_twelfth(size):
    factor = power_of_two(torch.tensor(size)).item()
    assert torch.frexp(torch.tensor(factor)).mantissa == 0.5
    if size > 1e-29:
        assert 2.0**11 <= size * factor < 2.0**12
    assert 0 < 1 / factor < torch.inf


@backends
def test_a_row_that_is_not_finite_spoils_itself_alone(backend):
    case = make_case(12, 70, dtype=torch.float16)
    clean = run(case, EVERYTHING, backend)
    row = int(clean.logprobs.nonzero()[0])
    with torch.no_grad():
        case.hidden[row, 0] = torch.nan
    found = run(case, EVERYTHING, backend)
    others = torch.arange(12) != row
    assert found.grads[0][row].isnan().all()
    assert max(error([found.grads[0][others]], [clean.grads[0][others].double()])) < 2e-3


# Products as CUDA has them ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda_products(monkeypatch):
    """CUDA's products of 16-bit operands, and the ways that lead to them, on CPU tensors."""

    def product(a, b, dtype, out=None):
        assert a.dtype == b.dtype
        found = a.to(dtype) @ b.to(dtype)
        return found if out is None else out.copy_(found)

    def add_product(total, a, b, beta=1.0):
        assert a.dtype == b.dtype != total.dtype
        total.copy_(a.to(total.dtype) @ b.to(total.dtype) + (beta * total if beta else 0))

    init = sources.LinearSource.__init__

    def as_on_cuda(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.widen = False

    monkeypatch.setattr(sources, "product", product)
    monkeypatch.setattr(sources, "add_product", add_product)
    monkeypatch.setattr(products, "product", product)
    monkeypatch.setattr(sources.LinearSource, "__init__", as_on_cuda)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kilobytes", [10, 5000])
def test_losses_with_products_of_cuda_are_right_over_chunks(dtype, kilobytes, cuda_products):
    case = make_case(60, 257, dtype=dtype, with_bias=True, temperature=0.7)
    with tk.budget_mb(kilobytes / 1024):
        found = run(case, EVERYTHING, "torch")
    limit = 1e-3 if dtype == torch.float16 else 1e-2
    assert max(error(found.grads, oracle(case, EVERYTHING).grads)) < limit


@pytest.mark.parametrize("flip", [False, True])
def test_slopes_that_grow_or_shrink_from_chunk_to_chunk_with_products_of_cuda(flip, cuda_products):
    hidden, weight, targets = head(64, 1000)
    advantages = 10.0 ** torch.linspace(-6, 0, 64)
    options = {"advantages": advantages.flip(0) if flip else advantages}
    wanted = loss_gradients((hidden.double(), weight.double()), targets, tk.Objective.grpo(), "reference", **options)
    with tk.budget_mb(0.01):
        found = loss_gradients((hidden, weight), targets, tk.Objective.grpo(), "torch", **options)
    assert max(error(found, wanted)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("kilobytes", [10, 5000])
def test_divergences_with_products_of_cuda_are_right_over_chunks(kind, dtype, kilobytes, cuda_products):
    case, other = (make_case(40, 257, dtype=dtype, seed=seed, with_bias=True) for seed in (0, 1))

    def gradients(dtype):
        params = [p.detach().to(dtype).requires_grad_() for p in case.params()]
        ref = [p.detach().to(dtype) for p in other.params()]
        out = tk.linear_divergence(
            *params[:2], *ref[:2], bias=params[2], ref_bias=ref[2], kind=kind, logit_scale=1.5, backend="torch"
        )
        return torch.autograd.grad(out.loss * SCALE, params)

    with tk.budget_mb(kilobytes / 1024):
        found = gradients(dtype)
    limit = 1e-3 if dtype == torch.float16 else 6e-3
    assert max(error(found, gradients(torch.float64))) < limit


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
def test_a_torch_that_adds_no_product_to_a_wide_sum_is_served_in_blocks(beta, monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(40, 8).bfloat16(), torch.randn(8, 6).bfloat16()
    before = torch.randn(40, 6)
    if beta == 0:
        before.fill_(torch.nan)  # a buffer that nobody wrote
    monkeypatch.setattr(products, "_ADDS_TO_WIDE", False)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 4 * 6 * 7)
    monkeypatch.setattr(products, "product", lambda a, b, dtype: a.to(dtype) @ b.to(dtype))
    total = before.clone()
    products.add_product(total, a, b, beta)
    wanted = a.float() @ b.float() + (beta * before if beta else 0)
    assert torch.allclose(total, wanted, atol=1e-5)


# Divergences ------------------------------------------------------------------------------------------------------


def divergence_gradient(params, kind):
    params = [p.detach().clone().requires_grad_() for p in params]
    out = tk.linear_divergence(params[0], params[1], params[2].detach(), params[3].detach(), kind=kind)
    return torch.autograd.grad(out.loss, params[:2])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("size", [0.5, 2.0, 4.0])
def test_bf16_divergences_are_rounded_once(size, kind):
    torch.manual_seed(0)
    hidden, ref = (size * torch.randn(2, 64, 64)).bfloat16()
    weight = torch.randn(300, 64).bfloat16()
    params = (hidden, weight, ref, weight.flip(0))
    wanted = divergence_gradient([p.double() for p in params], kind)
    assert max(error(divergence_gradient(params, kind), wanted)) < 2.5e-3  # what bf16 gradients have: 1.7e-3


@pytest.mark.parametrize("size", [0.5, 2.0, 4.0])
def test_the_anchor_of_asft_is_rounded_once(size):
    torch.manual_seed(0)
    hidden, ref = (size * torch.randn(2, 64, 64)).bfloat16()
    weight, targets = torch.randn(300, 64).bfloat16(), torch.randint(0, 300, (64,))

    def gradients(dtype):
        params = [p.to(dtype).requires_grad_() for p in (hidden, weight)]
        values = []
        for coef in (1.0, 1e-6):  # with the anchor and without
            out = tk.linear_policy_loss(
                *params, targets, tk.Objective.asft(asft_kl=coef), ref_hidden=ref.to(dtype),
                ref_weight=weight.flip(0).to(dtype),
            )  # fmt: skip
            values.append(torch.autograd.grad(out.loss, params))
        return [(a - b).double() for a, b in zip(*values, strict=True)]

    found, wanted = gradients(torch.bfloat16), gradients(torch.float64)
    assert max(error(found, wanted)) < 2e-2


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divergences_are_no_worse_than_trls(kind, dtype):
    peer = pytest.importorskip("trl.kernels.chunked_divergence", reason="trl is not installed")
    torch.manual_seed(0)
    hidden, ref = (2 * torch.randn(2, 64, 64)).to(dtype)
    weight = torch.randn(300, 64).to(dtype)
    params = (hidden, weight, ref, weight.flip(0))
    wanted = divergence_gradient([p.double() for p in params], kind)
    theirs = [p.clone().requires_grad_() for p in params[:2]]
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
    tokens, *_ = peer.ChunkedDivergenceFunction.apply(*theirs, None, params[2], params[3], None, beta)
    peers = error(torch.autograd.grad(tokens.mean(), theirs), wanted)
    ours = error(divergence_gradient(params, kind), wanted)
    assert all(a <= 1.02 * b for a, b in zip(ours, peers, strict=True)), (ours, peers)
