"""The fields of an `Objective` are told to people and to their editors here: their types, and other trainers' words."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Overrides", "refuse_unknown", "refusing_unknown", "show_signatures"]


class Overrides(TypedDict, total=False):
    """Names what a preset takes: any field of `Objective`, in place of its own."""

    expert: str | Callable[..., Tensor] | None
    alpha: float
    expert_coef: float
    policy: str | Callable[..., Tensor] | None
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    entropy_coef: float
    kl_coef: float
    tis_cap: float | None
    luffy_gamma: float
    policy_coef: float
    reduction: str
    sed_coef: float
    sed_k: int
    sed_tau: float
    eaft_power: float
    asft_kl: float
    pear_gamma: float
    pear_low: float
    pear_high: float
    pear_floor: float
    pear_ceil: float
    lco_beta: float
    lco_neg: float
    sapo_tau_pos: float
    sapo_tau_neg: float
    dppo_cap: float | None
    tis_low: float | None
    tis_mode: str
    tis_level: str
    pear_level: str
    pear_block: int
    off_policy_mask: float | None


# What TRL, Liger, verl and prime-rl call it -> the field, or where it belongs.
WORDS = {
    "beta": "kl_coef",
    "kl_beta": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "kl_coeff": "kl_coef",
    "kl_tau": "kl_coef",
    "epsilon": "clip_low (and clip_high)",
    "epsilon_low": "clip_low",
    "cliprange": "clip_low (and clip_high)",
    "clip_ratio": "clip_low (and clip_high)",
    "clip_ratio_low": "clip_low",
    "clip_eps": "clip_low (and clip_high)",
    "epsilon_high": "clip_high",
    "clip_ratio_high": "clip_high",
    "delta": "dual_clip",
    "clip_ratio_c": "dual_clip",
    "entropy_coeff": "entropy_coef",
    "tis_imp_ratio_cap": "tis_cap",
    "vllm_importance_sampling_cap": "tis_cap",
    "off_policy_mask_threshold": "off_policy_mask",
    "dppo_mask_low": "clip_low",
    "dppo_mask_high": "clip_high",
    "loss_agg_mode": "reduction",
    "loss_type": "reduction (and the preset: grpo, dapo, dr_grpo, gspo, ...)",
    "sapo_temperature_pos": "sapo_tau_pos",
    "sapo_temperature_neg": "sapo_tau_neg",
    "temperature": "temperature of the loss's call, no field of the objective",
    "ignore_index": "ignore_index of the loss's call, no field of the objective",
    "scale_rewards": "advantages, which come divided by their standard deviation or not",
    "num_items_in_batch": "normalizer of the loss's call, no field of the objective",
}


def refuse_unknown(caller: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError, in one line with what was probably meant, where a name is none of those that are known."""
    known = list(known)
    for name in names:
        if name not in known:
            near = WORDS.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), "")
            hint = f"; did you mean {near}?" if near else ""
            raise TypeError(f"{caller}: unknown field {name!r}{hint}")


def refusing_unknown(init: Callable[..., None], known: Iterable[str]) -> Callable[..., None]:
    """Returns the `__init__` of a dataclass that answers a field which is none as its presets do."""
    names = tuple(known)

    @functools.wraps(init)
    def refusing(self: Any, *args: Any, **fields: Any) -> None:
        refuse_unknown("Objective", fields, names)
        init(self, *args, **fields)

    return refusing


def show_signatures(owner: Any, presets: Any, names: Iterable[str]) -> None:
    """Gives each of `presets`, which `owner` inherits, a signature that names every field with its value there."""
    for name, method in vars(presets).items():
        if not isinstance(method, classmethod) or name.startswith("_"):
            continue
        function: Any = method.__func__
        made, signature = getattr(owner, name)(), inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        shown = [inspect.Parameter(field, kind, default=getattr(made, field)) for field in names]
        function.__signature__ = signature.replace(parameters=[*own, *shown])
