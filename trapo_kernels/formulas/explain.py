"""This file says what an objective computes, by which path and at what cost, in words: the text of
`Objective.explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .custom import function_name

if TYPE_CHECKING:
    from ..objective import Objective

__all__ = ["explain", "shown_setting"]

_REDUCTION = {
    "token_mean": "sum over active tokens / their number",
    "region_mean": "sum over own tokens / their number + sum over expert tokens / their number",
    "sequence_mean": "mean over sequences of the mean over their active tokens",
    "sum": "sum over active tokens",
}


def shown_setting(setting: Any) -> str:
    """Returns a field of an objective in a message."""
    return function_name(setting) if callable(setting) else repr(setting)


def explain(o: Objective) -> str:
    """Returns the text, a line a fact."""
    lines = ["loss of a token:"]
    for region, name, coef, term in o.parts:
        where = {"expert": "expert tokens", "own": "own tokens", "all": "all active tokens"}[region]
        label = f"{name} {shown_setting(getattr(o, name))}" if name in ("expert", "policy") else name
        lines.append(f"  {coef:g} · {label} on {where}: {term.source}")
    if o.tis_cap is not None:
        what = "π_old / π_rollout" if o.tis_level == "token" else "Π π_old / π_rollout of the sequence"
        low = "" if o.tis_low is None else f", at least {o.tis_low:g}"
        shape = (
            f"{what} where at most {o.tis_cap:g}{low}, else 0"
            if o.tis_mode == "mask"
            else f"min({what}, {o.tis_cap:g}){low}"
        )
        lines.append(f"  policy weighted by {shape}, a constant")
    if o.off_policy_mask is not None:
        lines.append(f"  no policy term where A < 0 and the sequence's mean log π_sampled / π > {o.off_policy_mask:g}")
    lines.append(f"reduction: {_REDUCTION[o.reduction]}; `normalizer` replaces the divisor")
    lines.append(f"inputs: {', '.join(sorted(o.needs)) or 'none'} needed")
    optional = sorted(o.reads - set(o.needs))
    if optional:
        lines[-1] += f"; {', '.join(optional)} used where given"
    if o.needs_sequences:
        lines[-1] += "; targets [B, T], a row a sequence, or sequence_ids"
    if o.coupled:
        terms = " and ".join(f"{name}={shown_setting(getattr(o, name))}" for _, name, _, t in o.parts if t.coupled)
        terms = terms or ("tis_level='sequence'" if o.off_policy_mask is None else "off_policy_mask")
        lines.append(
            f"path: two passes, because {terms} couples the tokens of a sequence: log-probabilities of all tokens "
            "first, then the terms on vectors, then the logits again for the gradients: 4 GEMMs (2·N·D·V FLOPs "
            "each); tokens without gradient 1, frozen weight or hidden states one less"
        )
    else:
        lines.append(
            "path: a single pass, loss and gradients together: 3 GEMMs (2·N·D·V FLOPs each); tokens without "
            "gradient 1, frozen weight or hidden states one less"
        )
    if o.reference_head:
        lines.append(
            "reference head: ref_hidden and ref_weight needed; a second stream over expert tokens, "
            "4 GEMMs: student's and reference's logits, two gradients"
        )
    if o.statistics:
        lines.append(f"statistics: {', '.join(o.statistics)}, one more pass over the logits each")
    slopes = "computed in the row kernel where it can" if o.fused() else "vectors, in torch"
    if any(term.own is not None for _, _, _, term in o.parts):
        slopes = "vectors, a function of yours by autograd"
    lines.append(f"slopes: {slopes}")
    return "\n".join(lines)
