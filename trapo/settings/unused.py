"""This file finds keys that a run does not read: what is set and changes nothing is said in one line, never taken in
silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trapo_kernels as tk
from trapo.guidance import Schedule

Values = Mapping[str, Any]

# Keys, when they are read, and what says so. The keys of a group are all that begin with its name and a dot.
_READ_ONLY: tuple[tuple[tuple[str, ...], Callable[[Values], bool], str], ...] = (
    (("rollout.dtype", "rollout.engine_args"), lambda v: v["rollout.engine"] in ("vllm", "auto"),
     "engine vllm reads it"),
    (("rollout.weight_sync", "rollout.sync_folder"), lambda v: v["rollout.engine"] == "vllm_server",
     "engine vllm_server reads it"),
    (("rollout.guard_tokens", "rollout.guard_tolerance"), lambda v: v["rollout.engine"] != "hf",
     "an engine with weights of its own is compared"),
    (("rollout.sync_folder",), lambda v: v["rollout.weight_sync"] == "folder", "weight_sync=folder reads it"),
    (("train.normalizer_constant",), lambda v: v["train.normalizer"] == "constant", "normalizer=constant reads it"),
    (("lora.alpha", "lora.targets"), lambda v: v["lora.rank"] > 0, "there are no adapters with lora.rank=0"),
    (("eval.every", "eval.before", "eval.samples", "eval.temperature", "eval.max_response_tokens", "data.eval_limit",
      "checkpoint.keep_best"), lambda v: v["data.eval"] is not None, "there is no data.eval"),
    (("log.rollouts",), lambda v: v["log.rollouts_every"] > 0, "rollouts_every=0 writes none"),
)  # fmt: skip
_OF_EXPERTS = tuple(f"guidance.{name}" for name in ("cut", "traces", "trace_part", "supervise", "ratios", "thresholds"))


def unused(
    values: Values, defaults: Values, objectives: Sequence[tk.Objective], schedules: Sequence[Schedule], mode: str
) -> str | None:
    """Returns a line that names the keys which are set to something else than their default and change nothing, each
    with its reason; None where every key counts.

    values, defaults: by dotted name. objectives, schedules: of the run's phases.
    """
    given = {name: value for name, value in values.items() if value != defaults.get(name)}
    found: dict[str, str] = {}
    for names, is_read, reason in _READ_ONLY:
        if not is_read(values):
            found |= dict.fromkeys(_named(given, *names), reason)
    found |= _of_objective(given, objectives, schedules)
    found |= _of_schedule(given, schedules, mode)
    with_advantages = any("advantages" in objective.needs for objective in objectives)
    if not with_advantages:
        found |= dict.fromkeys(_named(given, "advantage"), "no term reads advantages")
    if not (with_advantages or any(s.generates for s in schedules) or values["data.eval"] is not None):
        found |= dict.fromkeys(_named(given, "reward"), "nothing is scored")
    if not found:
        return None
    said = "; ".join(f"{name}={_shown(given[name])} ({reason})" for name, reason in found.items())
    return f"WARNING: without effect in this run: {said}"


def _named(given: Values, *names: str) -> list[str]:
    """Returns those that have one of the names, or are in a group of that name."""
    return [key for key in given if any(key == name or key.startswith(f"{name}.") for name in names)]


def _of_objective(given: Values, objectives: Sequence[tk.Objective], schedules: Sequence[Schedule]) -> dict[str, str]:
    found = {}
    for name in given:
        group, _, field = name.partition(".")
        if group != "objective":
            continue
        readers = [s for o, s in zip(objectives, schedules, strict=True) if field in o.effective]
        if not readers:
            terms = " and ".join(
                dict.fromkeys(f"expert={_shown(o.expert)}, policy={_shown(o.policy)}" for o in objectives)
            )
            found[name] = f"no term reads it: {terms}"
        elif not any(_has_tokens(field, objectives[0], s) for s in readers):
            found[name] = f"there are no {'expert' if field in _EXPERT_FIELDS else 'own'} tokens"
    return found


_EXPERT_FIELDS = {"expert", "expert_coef"} | {name for term in tk.EXPERT_TERMS.values() for name in term.fields}
_OWN_FIELDS = {"policy", "policy_coef", "kl_coef", "tis_cap", "tis_low", "tis_mode", "tis_level", "off_policy_mask"} | {
    name for term in tk.POLICY_TERMS.values() for name in term.fields
}


def _has_tokens(field: str, objective: tk.Objective, schedule: Schedule) -> bool:
    """Returns whether a run has tokens of the kind that a field is about."""
    if field in _EXPERT_FIELDS:
        return schedule.guides
    return field not in _OWN_FIELDS or schedule.generates


def _of_schedule(given: Values, schedules: Sequence[Schedule], mode: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in (("guidance.ratios", "ratio"), ("guidance.thresholds", "threshold")):
        had = [[getattr(group, field) for group in schedule.micro_groups] for schedule in schedules]
        if name in given and given[name] not in had:
            found[name] = f"mode {mode} has its own"
    if not any(schedule.guides for schedule in schedules):
        found |= dict.fromkeys(_named(given, *_OF_EXPERTS), f"mode {mode} guides no rollout")
    if not any(schedule.generates for schedule in schedules):
        names = ("guidance.group_size", "guidance.sizes", "guidance.stop_decided")
        found |= dict.fromkeys(_named(given, *names), f"mode {mode} draws no rollout")
    return found


def _shown(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value).lower()
