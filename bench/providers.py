"""Who computes the loss: every provider behind one signature, each through its package's public function. One list, for
CPUs (bench/cpu.py) and GPUs (bench/gpu).

All get the same inputs and, where their head returns log-probabilities, the same loss of those
(`policy_loss_from_logprobs`): what differs is how hidden states become log-probabilities, and their gradient.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trapo_kernels as tk

CHUNK = {"cpu": 512, "cuda": 4096}  # rows, of the bare GEMMs and of chunked checkpointing
# TRAPO's objective and the entropy bonus of its authors' code.
OBJECTIVE = tk.Objective.trapo(entropy_coef=0.001)


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    advantages: Tensor  # [N]
    expert_mask: Tensor  # [N]

    def double(self) -> Case:
        return replace(
            self, hidden=self.hidden.double(), weight=self.weight.double(), advantages=self.advantages.double()
        )


@dataclass(frozen=True)
class Provider:
    """`run(case)` -> the loss, to be differentiated; `gives`: which loss that is.

    "entropy": the whole objective. "logprobs": without the entropy bonus. "grpo": all tokens own, no entropy bonus.
    "nll": plain cross-entropy. "gemms": no loss, the bare products. "values": no gradients.
    """

    name: str
    run: Callable[[Case], Tensor | None]
    gives: str
    bounded: bool  # never holds [N, V]
    package: str | None = None  # on PyPI
    devices: tuple[str, ...] = ("cpu", "cuda")
    backend: str | None = None  # of ours

    def absent(self) -> str | None:
        """Returns why it cannot run here, in one line; None: nothing is known against it."""
        if self.backend is not None:
            return tk.backends()[self.backend].missing
        if self.package is not None and installed(self.package) is None:
            return f"{self.package} is not installed"
        if self.run in (torch_lce, torch_lce_chunked) and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy"
        return None


# PyPI's name -> the module's
MODULES = {
    "trl": "trl", "liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "verl": "verl",
    "quack-kernels": "quack",
}  # fmt: skip


def installed(package: str) -> str | None:
    """Returns the version of a package that is here, or None."""
    if importlib.util.find_spec(MODULES[package]) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a folder in PYTHONPATH
        return "unknown"


def _loss(case: Case, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    objective = OBJECTIVE if entropy is not None else replace(OBJECTIVE, entropy_coef=0.0)
    return tk.policy_loss_from_logprobs(
        logprobs, objective, entropy=entropy, advantages=case.advantages, expert_mask=case.expert_mask
    ).loss


def ours(backend: str, **options: object) -> Callable[[Case], Tensor]:
    def run(case: Case) -> Tensor:
        return tk.linear_policy_loss(
            case.hidden, case.weight, case.targets, OBJECTIVE, advantages=case.advantages,
            expert_mask=case.expert_mask, backend=backend, **options,
        ).loss  # fmt: skip

    return run


def ours_recomputing(backend: str) -> Callable[[Case], Tensor]:
    """Returns the loss with the recomputing backward: log-probabilities first, the objective on vectors, by
    autograd."""

    def run(case: Case) -> Tensor:
        found = tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend=backend)
        return _loss(case, *found)

    return run


def floor(case: Case) -> None:
    """Computes the three GEMMs of exact gradients and nothing else; d_weight is summed in fp32 on CUDA, and elsewhere
    in the operands' dtype, of which all three are then."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    rows = min(CHUNK[hidden.device.type], hidden.shape[0])
    logits = hidden.new_empty(rows, weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    if hidden.is_cuda:
        d_weight = d_weight.float()
    for start in range(0, hidden.shape[0], rows):
        chunk = hidden[start : start + rows]
        z, beta = logits[: chunk.shape[0]], float(start > 0)
        torch.mm(chunk, weight.t(), out=z)
        torch.mm(z, weight, out=d_hidden[start : start + rows])
        if hidden.is_cuda and hidden.dtype != torch.float32:
            torch.addmm(d_weight, z.t(), chunk, out_dtype=torch.float32, beta=beta, out=d_weight)
        else:
            d_weight.addmm_(z.t(), chunk, beta=beta)


@torch.no_grad()
def one_gemm(case: Case) -> None:
    """Computes the logits alone, in the chunks of `floor`."""
    rows = min(CHUNK[case.hidden.device.type], case.hidden.shape[0])
    logits = case.hidden.new_empty(rows, case.weight.shape[0])
    for chunk in case.hidden.split(rows):
        torch.mm(chunk, case.weight.t(), out=logits[: chunk.shape[0]])


@torch.no_grad()
def ours_forward(case: Case) -> None:
    """Computes log-probabilities and entropies without gradients."""
    tk.linear_logprobs(case.hidden, case.weight, case.targets, entropy=True, backend="cpu")


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    log_pi = F.log_softmax(logits, dim=-1)
    return log_pi.gather(1, targets[:, None]).squeeze(1), -(log_pi.exp() * log_pi).sum(1)


def eager(case: Case) -> Tensor:
    return _loss(case, *head(case.hidden, case.weight, case.targets))


def eager_without_entropy(case: Case) -> Tensor:
    nll = F.cross_entropy(F.linear(case.hidden, case.weight), case.targets, reduction="none")
    return _loss(case, -nll, None)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(head, fullgraph=True)


def compiled(case: Case) -> Tensor:
    return _loss(case, *_compiled()(case.hidden, case.weight, case.targets))


def chunked_checkpoint(case: Case) -> Tensor:
    rows = CHUNK[case.hidden.device.type]
    found = [
        checkpoint(head, hidden, case.weight, targets, use_reentrant=False)
        for hidden, targets in zip(case.hidden.split(rows), case.targets.split(rows), strict=True)
    ]
    return _loss(case, torch.cat([lp for lp, _ in found]), torch.cat([h for _, h in found]))


def trl_head(case: Case, outputs: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        case.hidden, case.weight, None, case.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )
    return logprobs, entropy


def trl(case: Case) -> Tensor:
    return _loss(case, *trl_head(case, ("entropy",)))


def trl_without_entropy(case: Case) -> Tensor:
    return _loss(case, *trl_head(case, ()))


@cache
def _liger_loss() -> Callable[..., tuple]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=1e6, epsilon_high=1e6, loss_type="dapo")


def liger(case: Case) -> Tensor:
    # Sequences of 64 tokens, each with the advantage of its first; no ratio bounds, so the gradient is −A ∂logp.
    length = 64
    shape = (case.hidden.shape[0] // length, length)
    loss, _ = _liger_loss()(
        case.hidden.view(*shape, -1), case.weight, case.targets.view(shape),
        torch.ones(shape, device=case.hidden.device), case.advantages.view(shape)[:, 0],
    )  # fmt: skip
    return loss


def liger_entropy(case: Case) -> Tensor:
    """Computes negative log-likelihoods and entropies: on Hopper its CuTe kernels, elsewhere chunks of plain torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        case.hidden, case.weight, case.targets, 1.0, -100, 1, True
    )
    return _loss(case, -nll, entropy)


def liger_cross_entropy(case: Case) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(case.hidden, case.weight, case.targets)[0]


def liger_hopper(case: Case) -> Tensor:
    """Runs Liger's CuTe kernels for sm_90: all logits at once, V a multiple of 256."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(case.hidden, case.weight, case.targets)


def verl(case: Case) -> Tensor:
    """Runs verl's Triton kernels, which recompute the logits in the backward."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprobs, entropy = linear_cross_entropy(case.hidden, case.weight, case.targets, 1.0, "none", None)
    return _loss(case, logprobs, entropy)


def quack(scaled_exp: bool) -> Callable[[Case], Tensor]:
    def run(case: Case) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(case.hidden, case.weight, case.targets, use_scaled_exp=scaled_exp)

    return run


def cce_exact(case: Case) -> Tensor:
    """Runs CCE's Triton kernels with the gradient filter off: exact gradients, as everybody else's."""
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none", impl="cce", filter_eps=None)
    return _loss(case, -nll, None)


def cce(case: Case) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none", impl="torch_compile")
    return _loss(case, -nll, None)


def torch_lce(case: Case) -> Tensor:
    return _loss(case, -F.linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="none"), None)


def torch_lce_chunked(case: Case) -> Tensor:
    """Computes plain cross-entropy: torch's chunked form gives no differentiable value per token."""
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden, case.weight, case.targets, options=options)


def _of_ours(backend: str, *devices: str) -> Provider:
    return Provider(f"trapo_kernels {backend}", ours(backend), "entropy", True, None, devices, backend)


def _recomputing(backend: str, *devices: str) -> Provider:
    name = f"trapo_kernels {backend}, recomputing"
    return Provider(name, ours_recomputing(backend), "entropy", True, None, devices, backend)


CUDA = ("cuda",)
EVERYBODY = [
    Provider("three bare GEMMs", floor, "gemms", True),
    Provider("one bare GEMM", one_gemm, "gemms", True, None, ("cpu",)),
    Provider("trapo_kernels cpu, forward alone", ours_forward, "values", True, None, ("cpu",), "cpu"),
    _of_ours("cuda", "cuda"),
    _of_ours("triton", "cuda"),
    _of_ours("cpu", "cpu"),
    _of_ours("torch", "cpu", "cuda"),
    _recomputing("cuda", "cuda"),
    _recomputing("triton", "cuda"),
    Provider("eager", eager, "entropy", False),
    Provider("torch.compile", compiled, "entropy", False),
    Provider("chunked checkpoint", chunked_checkpoint, "entropy", True),
    Provider("TRL chunked head", trl, "entropy", True, "trl"),
    Provider("Liger entropy head", liger_entropy, "entropy", True, "liger-kernel"),
    Provider("verl fused head", verl, "entropy", True, "verl", CUDA),
    Provider("eager, no entropy", eager_without_entropy, "logprobs", False),
    Provider("TRL chunked head, no entropy", trl_without_entropy, "logprobs", True, "trl"),
    Provider("Liger PPO head", liger, "grpo", True, "liger-kernel"),
    Provider("CCE torch_compile", cce, "logprobs", False, "cut-cross-entropy", ("cpu",)),
    Provider("CCE, exact", cce_exact, "logprobs", True, "cut-cross-entropy", CUDA),
    Provider("torch linear_cross_entropy", torch_lce, "logprobs", False),
    Provider("torch linear_cross_entropy, chunked", torch_lce_chunked, "nll", True),
    Provider("Liger fused linear CE", liger_cross_entropy, "nll", True, "liger-kernel", CUDA),
    Provider("Liger Hopper CE", liger_hopper, "nll", False, "liger-kernel", CUDA),
    Provider("quack", quack(False), "nll", True, "quack-kernels", CUDA),
    Provider("quack, scaled exp", quack(True), "nll", True, "quack-kernels", CUDA),
]


def on(device: str) -> list[Provider]:
    """Returns who runs on a type of device; see `Provider.absent`."""
    return [p for p in EVERYBODY if device in p.devices]


PROVIDERS = on("cpu")


def oracle(case: Case, gives: str) -> Tensor:
    """Returns the loss that a provider gives, in the dtype of the case and with everything in memory."""
    if gives == "nll":
        return F.cross_entropy(F.linear(case.hidden, case.weight), case.targets)
    if gives == "grpo":
        advantages = case.advantages.view(-1, 64)[:, :1].expand(-1, 64).reshape(-1)
        case = replace(case, advantages=advantages, expert_mask=torch.zeros_like(case.expert_mask))
    logprobs, entropy = head(case.hidden, case.weight, case.targets)
    return _loss(case, logprobs, entropy if gives == "entropy" else None)
