"""This file makes AdamW, and the learning rate over the steps of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from trapo.errors import TrapoError
from trapo.models.sharding import is_sharded, whole
from trapo.settings.groups import OptimConfig


def make_optimizer(
    model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter], optim: OptimConfig
) -> torch.optim.AdamW:
    """Returns the optimizer of these parameters of a model. Raises TrapoError where they are not float32."""
    if others := [p.dtype for p in parameters if p.dtype != torch.float32]:
        # An AdamW step is about lr in size: added to a 16-bit weight it is rounded away.
        raise TrapoError(f"model.dtype: training needs float32 weights; got {str(others[0]).removeprefix('torch.')}")
    return torch.optim.AdamW(
        parameters,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=has_fused(model),
    )


Gradients = dict[str, list[torch.Tensor | None]]  # of a region of tokens or of an optimizer, one a parameter


class Kept:
    """Holds gradients of regions of tokens, taken at the weights that there are, until all their optimizers step."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.gradients: Gradients = {}

    def keep(self, region: str) -> None:
        """Take the gradients away from the parameters."""
        self.gradients[region] = [p.grad for p in self.parameters]

    @torch.no_grad()
    def step(
        self, optimizers: Mapping[str, torch.optim.Optimizer], weight_decay: float, clip: float | None = None
    ) -> dict[str, float]:
        """Add the updates that the optimizers make of their regions' gradients, each from the weights before: all
        decay those, and none what another one has just added. The optimizers themselves have no weight decay.

        clip: the limit of each region's norm, where that was not clipped before. Returns those norms.
        """
        rates = sum(optimizers[region].param_groups[0]["lr"] for region in self.gradients)
        norms: dict[str, float] = {}
        if weight_decay:
            for p in self.parameters:
                p.mul_(1 - rates * weight_decay)
        for region, gradients in self.gradients.items():
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
            if clip is not None:
                norms[region] = clip_gradients(self.parameters, clip)
            optimizers[region].step()
            optimizers[region].zero_grad(set_to_none=True)
        self.gradients = {}
        return norms


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter],
    limit: float,
    loss: torch.Tensor | None = None,
    on_any_rank: Callable[[bool], bool] = bool,
) -> float:
    """Scales the gradients to a norm of at most `limit`, as torch's clip_grad_norm_ does, and returns the norm before;
    gradients well within the limit, or that are not finite, are left alone, where torch writes all once more.

    loss: where that is not finite, `on_any_rank`, the norm is NaN; both are read in one host sync.
    """
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    both = [whole(total).double()] if loss is None else [whole(total).double().to(loss.device), loss.double()]
    norm, *of_loss = torch.stack(both).tolist()
    if on_any_rank(not all(map(math.isfinite, of_loss))):
        return math.nan
    if math.isfinite(norm) and norm + 2e-6 > limit * 0.999:  # torch adds 1e-6 to the norm: near the limit it decides
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
    return norm


def main_grad(model: PreTrainedModel, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    """Returns the gradient of a head's weight, of zeros where there is none yet, for the loss to add to: of a head that
    is multiplied in 16 bits, or on a GPU, that saves a tensor of its size and the passes over it in every micro-batch.
    None: autograd hands the gradient over, as it must where the weight is sharded, or not a parameter itself."""
    if is_sharded(model) or not (weight.is_leaf and weight.requires_grad):
        return None
    if hidden.dtype == torch.float32 and not hidden.is_cuda:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    return weight.grad


def has_fused(model: PreTrainedModel) -> bool:
    """Returns whether AdamW can update these weights in one kernel: on CPUs and GPUs, unless shards are on a CPU."""
    return model.device.type == "cuda" or (model.device.type == "cpu" and not is_sharded(model))


def lr_factor(step: int, optim: OptimConfig, steps: int) -> float:
    """Returns what the learning rate of a step (counted from 0) is multiplied by. Warmup does not start at 0: a step
    whose rollouts were paid for should learn something."""
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    done = min(max(step - optim.warmup_steps, 0) / max(steps - optim.warmup_steps, 1), 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return warmup * decay[optim.schedule]


class Schedule:
    """Sets the learning rate of an optimizer over `steps` steps of a run, by `lr_factor`."""

    def __init__(self, optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int) -> None:
        self.optimizer, self.optim, self.steps = optimizer, optim, steps
        self.scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, optim, steps))

    @property
    def lr(self) -> float:
        """Returns the rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self) -> None:
        """Go on to the next step's rate."""
        with warnings.catch_warnings():  # a first step with nothing to learn has a schedule step, no optimizer step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def resume(self, state: dict[str, Any]) -> None:
        """Take over the state of a run that goes on; of more steps than there were, the next step's rate is that of the
        longer schedule."""
        self.scheduler.load_state_dict(state)
        factor = lr_factor(self.scheduler.last_epoch, self.optim, self.steps)
        self.scheduler._last_lr = [base * factor for base in self.scheduler.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self.scheduler._last_lr, strict=True):
            group["lr"] = lr
