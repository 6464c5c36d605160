"""This file looks for weights that are not numbers any more: they are never saved, and nothing is generated with
them."""

from __future__ import annotations

import torch
from torch import nn

from trapo.errors import TrapoError
from trapo.runs.ranks import Ranks


@torch.no_grad()
def not_finite(model: nn.Module, *, trained: bool = False) -> str | None:
    """Returns the name of the first parameter (of the `trained` ones) that holds NaN or an infinity; of a sharded one
    this rank's part is looked at."""
    names, extremes = [], []
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "to_local", lambda p=parameter: p)()
        if local.numel() and (parameter.requires_grad or not trained) and local.is_floating_point():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(local)).float())  # NaN goes through
    if not extremes:
        return None
    finite = torch.stack([extreme.to(extremes[0].device) for extreme in extremes]).isfinite().all(dim=1).tolist()
    return next((name for name, good in zip(names, finite, strict=True) if not good), None)


def refuse_not_finite(model: nn.Module, ranks: Ranks, step: int, saved: int, *, trained: bool = False) -> None:
    """Raises TrapoError on all ranks when a weight of one is not finite. saved: the step of the last checkpoint."""
    found = [name for name in ranks.gather([not_finite(model, trained=trained)]) if name]
    if found:
        after = f"the checkpoint of step {saved} is sound" if saved else "there is no checkpoint yet"
        raise TrapoError(
            f"weights are not finite after step {step} (the first: {found[0]}); nothing is saved of them. {after}: the "
            "same command goes on from there; if it ends like this again, lower optim.lr"
        )
