"""From rows to tables: means, intervals, paired differences, and what is still missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from study.ablations import ABLATION_TASK, CONDITION_ARMS, CONDITIONS, TRAPO_VARIANTS
from study.arms import ARMS
from study.evaluate import unpacked
from study.intervals import Estimate, estimate
from study.jobs import PARTS, Study, Sweep, changes_nothing, jobs
from study.results import Row

PARTS_OF_TRAPO = {
    "an expert term on the prefixes": "micro_groups",
    "TrSFT instead of NLL": "micro_groups_nll",
    "a ladder that follows the rewards, not half a trace, the same four times": "fixed_prefix",
    "a ladder that follows the rewards, not a random prefix, the same four times": "random_prefix",
    "the paper's settings, not its code's": "trapo_official",
}
VARIANTS_AGAINST = ("trapo_paper", "micro_groups_nll", "sft")
BASELINES = ("sft_then_rl", "grpo", "sft")  # what each arm is compared with


def right(row: Row, count: int) -> np.ndarray:
    """Returns [problems] bool of a run's greedy answers."""
    return unpacked(row["test_right"], count)


def by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    return {row["seed"]: row for row in rows}


def accuracy(rows: Sequence[Row], count: int) -> Estimate:
    """Returns the greedy test accuracy of several seeds."""
    return estimate(np.array([right(row, count) for row in rows], dtype=float))


def paired(
    rows: Sequence[Row], others: Sequence[Row], values: Callable[[Row], np.ndarray]
) -> tuple[Estimate, int] | None:
    """Returns `rows` − `others` by seed and problem, and over how many seeds; None where no seed is shared."""
    mine, theirs = by_seed(rows), by_seed(others)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    values_of = [[np.asarray(values(side[seed]), float) for seed in seeds] for side in (mine, theirs)]
    return estimate(np.subtract(*values_of)), len(seeds)


def differences(
    rows: Sequence[Row], against: Iterable[Sequence[Row]], values: Callable[[Row], np.ndarray]
) -> list[str]:
    """Returns a cell for each of `against`: the paired difference; blank for the rows themselves and without a shared
    seed."""
    compared = [None if rows == others else paired(rows, others, values) for others in against]
    return [points(c[0]) if c else "" for c in compared]


def finished_by_arm(study: Study, part: str) -> dict[tuple[str, ...], list[Row]]:
    """Returns (task, arm) or (task, arm, variant) -> finished rows."""
    grouped: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in study.part(part).finished().values():
        name = (row["task"], row["arm"], row["variant"]) if "variant" in row else (row["task"], row["arm"])
        grouped[name].append(row)
    return grouped


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def points(e: Estimate) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def base_table(study: Study) -> str:
    """Returns the base models by length."""
    out = []
    for row in study.part("pretrain").finished().values():
        parts = {"all": row, **row["by_length"]}
        for length, part in parts.items():
            out.append([row["task"], length, *(f"{100 * part[k]:.1f}" for k in ("greedy", "pass@1", "pass@8"))])
    return table(("task", "length", "greedy", "pass@1 (T=1)", "pass@8 (T=1)"), out) if out else NOTHING


NOTHING = "*Not run yet.*"


def arms_table(study: Study, task: str) -> str:
    """Returns one row per arm: test accuracy, differences to the baselines, cost."""
    found, count = finished_by_arm(study, "arms"), study.settings.test_problems
    out = [_base_cells(row, count) for row in base_scores(study, task)]
    for arm in ARMS:
        rows = found.get((task, arm), [])
        if not rows:
            continue
        e = accuracy(rows, count)
        others = [found.get((task, other), []) for other in BASELINES]
        out.append(
            [
                ARMS[arm].label,
                str(len(rows)),
                percent(e),
                f"{100 * e.seed_std:.1f}",
                f"{100 * _mean(rows, 'test_sampled'):.1f}",
                f"{100 * _mean(rows, 'test_last'):.1f}",
                *differences(rows, others, partial(right, count=count)),
                f"{_mean(rows, 'generated_tokens') / 1e6:.2f}",
                f"{_mean(rows, 'trained_tokens') / 1e6:.2f}",
                f"{_mean(rows, 'cpu_seconds_train'):.0f}",
            ]
        )
    against = [f"− {ARMS[b].label}" for b in BASELINES]
    header = ("arm", "seeds", "test, greedy [95%]", "std over seeds", "test, T=1", "last step", *against)
    return table((*header, "M tokens generated", "M tokens trained", "core-seconds"), out) if out else NOTHING


def _base_cells(row: Row, count: int) -> list[str]:
    blank = [""] * (len(BASELINES) + 4)  # last step, differences, tokens, time
    return ["base", "", percent(accuracy([row], count)), "", f"{100 * row['test_sampled']:.1f}", *blank]


def parts_table(study: Study, task: str) -> str:
    """Returns what a part of TRAPO is worth: paired differences between TRAPO paper and the arms that lack the part."""
    found, count = finished_by_arm(study, "arms"), study.settings.test_problems
    out = []
    for part, other in PARTS_OF_TRAPO.items():
        sides = (found.get((task, arm), []) for arm in ("trapo_paper", other))
        compared = paired(*sides, partial(right, count=count))
        if compared:
            out.append([part, ARMS[other].label, points(compared[0]), str(compared[1])])
    return table(("part", "arm without it", "TRAPO paper − that arm", "seeds"), out) if out else NOTHING


def lengths_table(study: Study, task: str) -> str:
    """Returns the greedy test accuracy by problem length, means over seeds."""
    found = finished_by_arm(study, "arms")
    out, lengths = [], []
    for arm in ARMS:
        if rows := found.get((task, arm)):
            lengths = list(rows[0]["test_by_length"])
            means = [np.mean([row["test_by_length"][n] for row in rows]) for n in lengths]
            out.append([ARMS[arm].label, *(f"{100 * m:.1f}" for m in means)])
    return table(("arm", *lengths), out) if out else NOTHING


def passes_table(study: Study, task: str) -> str:
    """Returns pass@k at T = 1, before and after; at the largest k the paired differences from the base and from
    GRPO."""
    found = finished_by_arm(study, "arms")
    # the one base model is every seed's start
    base = [{**row, "seed": seed} for row in base_scores(study, task) for seed in study.settings.seeds]
    lines = {"base": base, **{ARMS[arm].label: found.get((task, arm), []) for arm in ARMS}}
    out, ks = [], []
    for label, scored in lines.items():
        if rows := [row for row in scored if "pass_at" in row]:
            ks = list(rows[0]["pass_at"])
            means = [f"{100 * np.mean([row['pass_at'][k] for row in rows]):.1f}" for k in ks]
            compared = differences(rows, (base, found.get((task, "grpo"), [])), _ever_right)
            out.append([label, *means, *(compared if label != "base" else ("", ""))])
    header = ("arm", *(f"k={k}" for k in ks), *(f"k={k}: − {other}" for k in ks[-1:] for other in ("base", "GRPO")))
    return table(header, out) if out else NOTHING


def _ever_right(row: Row) -> np.ndarray:
    """Returns [problems]: whether one of all samples was right, which is pass@k for k = all of them."""
    return np.array(row["pass_right"]) > 0


def base_scores(study: Study, task: str) -> list[Row]:
    return [row["test"] for row in study.part("pretrain").finished().values() if row["task"] == task]


def sweep_table(study: Study, task: str) -> str:
    """Returns every setting that was tried, arm by arm, with its validation score; the chosen one in bold."""
    sweep, order = Sweep(study), list(ARMS)
    mine = [(row.get("variant", ""), row["arm"], row) for row in sweep.rows.values() if row["task"] == task]
    out = []
    for condition, arm, row in sorted(mine, key=lambda m: (m[0], order.index(m[1]))):
        knobs = ", ".join(f"{k} {v:g}" for k, v in row["knobs"].items())
        score = f"{100 * row['validation']:.1f}" if row["status"] == "finished" else row["status"]
        if row["knobs"] == sweep.chosen(task, arm, condition):
            score = f"**{score}**"
        label = ", ".join(filter(None, (ARMS[arm].label, condition)))
        out.append([label, knobs, score, str(row.get("validation_step", ""))])
    return table(("arm", "settings", "best validation, greedy", "at step"), out) if out else NOTHING


def ablations_table(study: Study) -> str:
    """Returns variants of TRAPO paper, as differences from the arm itself and from others over the same seeds."""
    found, count = finished_by_arm(study, "ablations"), study.settings.test_problems
    arms = finished_by_arm(study, "arms")
    against = [arms.get((ABLATION_TASK, arm), []) for arm in VARIANTS_AGAINST]
    plain, knobs = against[0], Sweep(study).chosen(ABLATION_TASK, "trapo_paper")
    out = [["TRAPO paper", *_variant_cells(plain, against, count)]] if plain else []
    for name, variant in TRAPO_VARIANTS.items():
        if rows := found.get((ABLATION_TASK, "trapo_paper", name)):
            out.append([name, *_variant_cells(rows, against, count)])
        elif plain and knobs and changes_nothing(study.settings, "trapo_paper", knobs, variant):
            out.append([f"{name}: the arm itself", *_variant_cells(plain, against, count)])
    others = (f"− {ARMS[arm].label}" for arm in VARIANTS_AGAINST)
    header = ("variant", "seeds", "test, greedy [95%]", "% guided at the end", "k expert tokens", *others)
    return table(header, out) if out else NOTHING


def _variant_cells(rows: Sequence[Row], against: Iterable[Sequence[Row]], count: int) -> list[str]:
    guided = np.mean([row["series"][-1]["guided"] for row in rows])
    return [
        str(len(rows)),
        percent(accuracy(rows, count)),
        f"{100 * guided:.0f}",
        f"{_mean(rows, 'expert_tokens') / 1e3:.0f}",
        *differences(rows, against, partial(right, count=count)),
    ]


def lock_in_table(study: Study) -> str:
    """Returns the share of expert tokens below the arm's α on the way, as means over stretches of steps."""
    arms, ablated = finished_by_arm(study, "arms"), finished_by_arm(study, "ablations")
    lines = {ARMS[arm].label: arms.get((ABLATION_TASK, arm), []) for arm in ("sft", "micro_groups_nll", "trapo_paper")}
    lines["TRAPO paper, alpha=0.03"] = ablated.get((ABLATION_TASK, "trapo_paper", "alpha=0.03"), [])
    out, steps = [], []
    for label, rows in lines.items():
        if rows:
            shown = range(0, len(rows[0]["series"]), 3)
            steps = [rows[0]["series"][i]["step"] for i in shown]
            shares = [[row["series"][i]["trsft_clipped"] or 0.0 for row in rows] for i in shown]
            out.append([label, *(f"{100 * np.mean(share):.2f}" for share in shares)])
    return table(("arm", *(f"to step {step}" for step in steps)), out) if out else NOTHING


def conditions_table(study: Study) -> str:
    """Returns the arms again under other conditions, below part 2's; TRAPO against the others, paired."""
    count, seeds = study.settings.test_problems, study.settings.ablation_seeds
    wanted = {job.key for job in jobs(study, "ablations")}
    lines: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {arm: [] for arm in CONDITION_ARMS})
    for (task, arm), rows in finished_by_arm(study, "arms").items():
        if task == ABLATION_TASK and arm in CONDITION_ARMS:
            lines["as in part 2"][arm] = [row for row in rows if row["seed"] in seeds]
    ablated = finished_by_arm(study, "ablations")
    for condition in CONDITIONS:
        for arm in CONDITION_ARMS:
            for row in ablated.get((ABLATION_TASK, arm, condition), []):
                # a condition that was tuned anew later has runs with part 2's settings, too
                name = condition if row["key"] in wanted else f"{condition}, part 2's settings"
                lines[name][arm].append(row)
    out = []
    for name, cells in lines.items():
        scores = [percent(accuracy(rows, count)) if rows else "" for rows in cells.values()]
        others = [cells[other] for other in BASELINES]
        compared = differences(cells["trapo_paper"], others, partial(right, count=count))
        runs = "/".join(str(len(rows)) for rows in cells.values())
        out.append([name, runs, *scores, *compared])
    against = (f"TRAPO − {ARMS[other].label}" for other in BASELINES)
    return table(("condition", "seeds", *(ARMS[a].label for a in CONDITION_ARMS), *against), out) if out else NOTHING


def exact_rows(study: Study, kind: str) -> list[Row]:
    """Returns the rows of part 1: `proposition`, `tables` or `transformers`."""
    pieces = study.part("exact").finished()
    return [row for key, piece in pieces.items() if key.startswith(kind + "/") for row in piece["rows"]]


def proposition_table(study: Study) -> str:
    """Returns what TrSFT forgets."""
    found = exact_rows(study, "proposition")
    if not found:
        return NOTHING
    out = [
        [
            r["expert"],
            r["objective"],
            f"{r['classes_kept']} of {r['classes']}" + (" (one in part)" if r["one_kept_in_part"] else ""),
            f"{100 * r['expert_mass_forgotten']:.1f}",
            f"{abs(r['entropy_lost']):.2f}",
            f"{r['total_variation_found_vs_predicted']:.4f}",
        ]
        for r in found
    ]
    header = ("expert", "loss", "classes kept", "% of the expert's mass forgotten", "entropy lost, nats")
    return table((*header, "distance of the minimiser found by descent"), out)


def void_table(study: Study) -> str:
    """Returns the void mass of the one-token tables."""
    found = exact_rows(study, "tables")
    if not found:
        return NOTHING
    shares = sorted({r["share_of_style_a"] for r in found})
    names = list(dict.fromkeys(r["objective"] for r in found))
    cell = {(r["objective"], r["share_of_style_a"]): r for r in found}
    out = [[name, *(_two_masses(cell.get((name, s))) for s in shares)] for name in names]
    return table(("loss", *(f"{100 * s:g}% A" for s in shares)), out)


def _two_masses(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['void']:.1f} / {100 * row['style_b']:.1f}"


def void_transformer_table(study: Study) -> str:
    """Returns the void mass of the small transformers, mean and range over seeds."""
    found = exact_rows(study, "transformers")
    if not found:
        return NOTHING
    cells: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for r in found:
        cells[r["objective"], r["steps"]].append(r)
    steps = sorted({s for _, s in cells})
    names = list(dict.fromkeys(name for name, _ in cells))
    out = [[name, *(_void_cell(cells[name, s]) for s in steps)] for name in names]
    return table(("loss", *(f"{s} steps" for s in steps)), out)


def _void_cell(rows: Sequence[Row]) -> str:
    void, b = ([100 * r[k] for r in rows] for k in ("void", "style_b"))
    return f"{np.mean(void):.1f} ({min(void):.1f} to {max(void):.1f}) / {np.mean(b):.1f}"


def smollm_table(study: Study) -> str:
    """Returns the table of part 4: accuracy with its interval over the test problems, paired differences from the best
    SFT and GRPO."""
    rows = list(study.part("smollm").finished().values())
    if not rows:
        return NOTHING
    sft = [row for row in rows if row["arm"].startswith("sft")]
    best = [max(sft, key=lambda row: row["eval_after"])] if sft else []
    against = (best, [row for row in rows if row["arm"] == "grpo"])
    out = []
    for row in rows:
        low, high = row["eval_after_interval"]
        compared = differences([row], against, itemgetter("test_rewards"))
        after = f"{100 * row['eval_after']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        counts = (f"{row[k] / 1e3:.0f}" for k in ("expert_tokens", "generated_tokens", "trained_tokens"))
        before = f"{100 * row['eval_before']:.1f}"
        out.append([row["arm"], str(row["steps"]), before, after, *compared, *counts, f"{row['seconds'] / 60:.0f}"])
    tokens = (f"k {kind} tokens" for kind in ("expert", "generated", "trained"))
    header = ("arm", "steps", "before", "after [95%]", "− best SFT run", "− GRPO", *tokens, "minutes on a core")
    return table(header, out)


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _hours(rows: Sequence[Row]) -> float:
    return sum(row["cpu_seconds"] if "cpu_seconds" in row else row["seconds"] for row in rows) / 3600


def status(study: Study, part: str) -> str:
    """Returns what is done of a part (of all of them for `status`), and what the rest will cost."""
    lines = []
    for name in PARTS if part == "status" else [part]:
        if name not in PARTS:
            rows = study.part(name).rows()
            lines.append(f"{name}: {sum(r['status'] == 'finished' for r in rows)} rows finished")
            continue
        todo = {job.key for job in jobs(study, name)}
        rows = study.part(name).rows()
        done = [r for r in rows if r["status"] == "finished"]
        failed = [r["key"] for r in rows if r["status"] == "failed"]
        left = len(todo - {r["key"] for r in done} - set(failed))
        further = [r for r in done if r["key"] not in todo]  # a choice made since then no longer asks for them
        spent = f" in {_hours(done):.1f} core-hours" if done else ""
        # SFT's runs come first and are cheap: no estimate before each arm has a run.
        known = left > 0 and {r["arm"] for r in done} == set(ARMS)
        cost = f", the rest about {_hours(done) * left / len(done):.1f}" if known else ""
        told = f"{name}: {len(done) - len(further)} of {len(todo)} known runs finished"
        if further:
            told += f" (and {len(further)}, {_hours(further):.1f} core-hours, that a later choice made needless)"
        lines.append(f"{told}{spent}{cost}; failed: {failed or 'none'}")
    if missing := sorted(set(study.settings.tasks) - set(study.ready_tasks())):
        lines.append(f"no base model yet: {', '.join(missing)}")
    return "\n".join(lines)


def cost_table(study: Study) -> str:
    """Returns the processor time of the finished runs, by part and task; of smollm the time on one core."""
    grouped: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for part in (*PARTS, "smollm"):
        for row in study.part(part).finished().values():
            grouped[part, row["task"]].append(row)
    out = [[part, task, str(len(rows)), f"{_hours(rows):.1f}"] for (part, task), rows in grouped.items()]
    return table(("part", "task", "runs", "core-hours"), out) if out else NOTHING


def all_tables(study: Study) -> dict[str, Any]:
    """Returns every generated region of docs/study.md by its mark."""
    regions = {
        "proposition": proposition_table(study),
        "void": void_table(study),
        "void-transformer": void_transformer_table(study),
        "base": base_table(study),
        "ablations": ablations_table(study),
        "conditions": conditions_table(study),
        "lock-in-chain": lock_in_table(study),
        "smollm": smollm_table(study),
        "cost": cost_table(study),
        "status": "```\n" + status(study, "status") + "\n```",
    }
    for task in study.settings.tasks:
        regions[f"arms-{task}"] = arms_table(study, task)
        regions[f"parts-{task}"] = parts_table(study, task)
        regions[f"lengths-{task}"] = lengths_table(study, task)
        regions[f"passes-{task}"] = passes_table(study, task)
        regions[f"sweep-{task}"] = sweep_table(study, task)
    return regions
