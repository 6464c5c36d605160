"""The tables of the regime study, from whatever rows there are: each says of how many seeds, and what is empty."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from study.intervals import Estimate, estimate
from study.jobs import Study
from study.regime_arms import MAIN, REGIME_ARMS
from study.regime_scores import KINDS, counts
from study.regimes import BASES, PART, RegimeSweep, regime_jobs
from study.results import Row
from study.summary import NOTHING, percent, points, table
from study.wait import CORNERS, HARD

EMPTY = "not run"
MISSING, TURNS, NEITHER = "wait-turns0-missing25", "wait-turns30-missing0", "wait-turns0-missing0"
TITLES = {
    HARD: "wrong turns, missing facts",
    TURNS: "wrong turns alone",
    MISSING: "missing facts alone",
    NEITHER: "neither",
}


class Found:
    """Holds the rows that count: finished ones, at the settings that their arm has by now."""

    def __init__(self, study: Study) -> None:
        self.study, self.sweep, s = study, RegimeSweep(study), study.settings
        self.runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
        force = {arm: dict(self.sweep.in_force(arm)) for arm in REGIME_ARMS}
        for row in self.sweep.rows.values():
            ours = row["seed"] != s.sweep_seed and row["knobs"] == force.get(row["arm"])
            if row["status"] == "finished" and ours:
                self.runs[row["task"], row["arm"]].append(row)
        self.bases = {(row["task"], row["seed"]): row["test"] for row in study.part(BASES).finished().values()}

    def tuned(self, arm: str) -> bool:
        return self.sweep.chosen(arm) is not None

    def values(self, rows: Sequence[Row], score: str = "test") -> np.ndarray:
        """Returns the share of right samples, [runs, problems]. score: test (T = 0.6) or sampled (T = 1)."""
        s = self.study.settings
        samples = s.cool_samples if score == "test" else s.pass_samples
        return np.array([counts(row[f"{score}_right"]) / samples for row in rows])

    def accuracy(self, rows: Sequence[Row]) -> Estimate:
        return estimate(self.values(rows))

    def difference(self, corner: str, arm: str, other: str, score: str = "test") -> tuple[Estimate, int] | None:
        """Returns arm − other (`base`: the base model) by base, seed and problem, and of how many runs; None where they
        share none."""
        mine = {(row["base_seed"], row["seed"]): row for row in self.runs[corner, arm]}
        if other == "base":
            start = {base: self.bases.get((CORNERS[corner].base, base)) for base, _ in mine}
            theirs = {key: row for key in mine if (row := start[key[0]]) is not None}
        else:
            theirs = {(row["base_seed"], row["seed"]): row for row in self.runs[corner, other]}
        shared = sorted(mine.keys() & theirs.keys())
        if not shared:
            return None
        sides = [self.values([side[key] for key in shared], score) for side in (mine, theirs)]
        return estimate(np.subtract(*sides)), len(shared)


def hard_table(study: Study) -> str:
    """Returns every arm in the hard corner."""
    found = Found(study)
    out = [_base_cells(row) for (name, _), row in found.bases.items() if name == CORNERS[HARD].base]
    for arm, about in REGIME_ARMS.items():
        rows = found.runs[HARD, arm]
        if not rows:
            continue
        compared = found.difference(HARD, "trapo", arm) if arm != "trapo" else None
        out.append(
            [
                about.label,
                _runs(rows),
                "swept" if found.tuned(arm) else "start",
                percent(found.accuracy(rows)),
                *(f"{100 * _mean(rows, key):.1f}" for key in ("greedy", "sampled")),
                f"{100 * np.mean([row['pass_at'][_largest(row)] for row in rows]):.1f}",
                points(compared[0]) if compared else "",
                *(_share([row["lines_right"][kind] for row in rows]) for kind in KINDS),
                f"{_mean(rows, 'wrong_turns'):.2f}",
                f"{_mean(rows, 'expert_tokens') / 1e3:.0f}",
                f"{_mean(rows, 'cpu_seconds_train'):.0f}",
            ]
        )
    kinds = (f"% of {kind} facts right" for kind in KINDS)
    header = ("arm", "runs", "settings", "T = 0.6 [95%]", "greedy", "T = 1", "pass@8, T = 1", "TRAPO 0.1 − arm")
    return table((*header, *kinds, "wrong turns", "k expert tokens", "core-s"), out) if out else NOTHING


def _base_cells(row: Row) -> list[str]:
    return [
        "base",
        "",
        "",
        *(f"{100 * row[key]:.1f}" for key in ("test", "greedy", "sampled")),
        f"{100 * row['pass_at'][_largest(row)]:.1f}",
        "",
        *(_share([row["lines_right"][kind]]) for kind in KINDS),
        f"{row['wrong_turns']:.2f}",
        "",
        "",
    ]


def corners_table(study: Study) -> str:
    """Returns the arms that run in all corners: accuracy at T = 0.6, and of how many runs."""
    found = Found(study)
    out = [["base", *(_base_of(found, corner) for corner in TITLES)]]
    for arm in MAIN:
        cells = []
        for corner in TITLES:
            rows = found.runs[corner, arm]
            cells.append(f"{percent(found.accuracy(rows))}, {_runs(rows)}" if rows else EMPTY)
        out.append([REGIME_ARMS[arm].label, *cells])
    return table(("arm", *TITLES.values()), out)


def _base_of(found: Found, corner: str) -> str:
    rows = [row for (name, _), row in found.bases.items() if name == CORNERS[corner].base]
    return f"{100 * np.mean([row['test'] for row in rows]):.1f}" if rows else EMPTY


@dataclasses.dataclass(frozen=True)
class Claim:
    """Is a part of a prediction: what an arm's difference to another should be, in a corner."""

    prediction: str
    corner: str
    arm: str
    other: str
    above: float | None = None  # the difference is above this
    within: float | None = None  # it is nearer to 0 than this; neither: it is not below 0
    score: str = "test"

    def says(self) -> str:
        names = [REGIME_ARMS[arm].label if arm in REGIME_ARMS else "base" for arm in (self.arm, self.other)]
        unit = " at T = 1" if self.score == "sampled" else ""
        if self.within is not None:
            return f"{names[0]} is within {100 * self.within:.0f} points of {names[1]}{unit}"
        if self.above is None:
            return f"{names[0]} is not below {names[1]}{unit}"
        return f"{names[0]} is {f'{100 * self.above:.0f} points ' if self.above else ''}above {names[1]}{unit}"

    def verdict(self, e: Estimate) -> str:
        """Returns held, failed or open, by `RULES.md`."""
        if self.within is not None:
            inside = -self.within < e.low and e.high < self.within
            return "held" if inside else "failed" if e.low > self.within or e.high < -self.within else "open"
        if self.above is None:
            return "failed" if e.high < 0 else "held"
        return "held" if e.low > self.above else "failed" if e.high < self.above else "open"


CLAIMS = (
    *(Claim("P1", corner, "trapo", "nll", above=0.2) for corner in (HARD, TURNS)),
    *(Claim("P1", corner, "base", "nll", above=0.0, score="sampled") for corner in (HARD, TURNS)),
    *(Claim("P2", corner, "trapo", "trapo_003", above=0.0) for corner in (HARD, TURNS)),
    Claim("P2", MISSING, "trapo_003", "trapo"),
    Claim("P2", MISSING, "nll", "trapo"),
    Claim("P3", HARD, "trapo", "grpo", above=0.0),
    Claim("P3", HARD, "trapo", "sft_then_rl", above=0.0),
    Claim("P3", TURNS, "grpo", "trapo"),
    Claim("P4", HARD, "always", "trapo", within=0.04),
    Claim("P5", MISSING, "sft_then_rl", "trapo", above=0.0),
)


def claims_table(study: Study) -> str:
    """Returns what was predicted, and how it stands: a hypothesis below five runs or before both sweeps."""
    found, out = Found(study), []
    for claim in CLAIMS:
        pair = (claim.other, "base") if claim.arm == "base" else (claim.arm, claim.other)
        compared = found.difference(claim.corner, *pair, score=claim.score)
        cells = [claim.prediction, TITLES[claim.corner], claim.says()]
        if compared is None:
            out.append([*cells, "", "", EMPTY])
            continue
        e, count = compared
        if claim.arm == "base":
            e = Estimate(-e.mean, -e.high, -e.low, e.seed_std)
        # Five runs at settings that a sweep chose, on both sides: less is a hypothesis
        sure = count >= 5 and all(found.tuned(arm) for arm in pair if arm != "base")
        out.append([*cells, points(e), str(count), claim.verdict(e) + ("" if sure else ", a hypothesis")])
    return table(("", "corner", "prediction", "difference, points [95%]", "runs", "so far"), out)


def courses_table(study: Study) -> str:
    """Returns the hard corner's accuracy on the way: greedy, on validation problems, with what it had cost by then."""
    found, out = Found(study), []
    for arm, about in REGIME_ARMS.items():
        if rows := found.runs[HARD, arm]:
            curves = np.array([[value for _, value in row["validation_curve"]] for row in rows]).mean(0)
            spent = np.array([row["spent"] for row in rows]).mean(0)  # [validations, (tokens, seconds)]
            cells = [
                f"{100 * value:.0f} ({tokens / 1e3:.0f} k, {seconds:.0f} s)"
                for value, (tokens, seconds) in zip(curves, spent, strict=True)
            ]
            out.append([about.label, *cells])
            steps = [str(step) for step, _ in rows[0]["validation_curve"]]
    return table(("arm", *(f"step {step}" for step in steps)), out) if out else NOTHING


def lock_in_table(study: Study) -> str:
    """Returns the share of expert tokens below α, over the run."""
    found, out = Found(study), []
    for arm in ("trapo", "trapo_003", "nll", "always", "no_policy", "sft_then_trapo"):
        if rows := found.runs[HARD, arm]:
            series = [[point["trsft_clipped"] for point in row["series"]] for row in rows]
            thirds = [_third(series, i) for i in range(3)]
            guided = np.mean([row["series"][-1]["guided"] for row in rows])
            out.append([REGIME_ARMS[arm].label, *(_share([value]) for value in thirds), f"{100 * guided:.0f}"])
    header = ("arm", "first third", "second third", "last third", "% guided at the end")
    return table(header, out) if out else NOTHING


def _third(series: Sequence[Sequence[float | None]], which: int) -> float | None:
    found = [v for run in series for v in np.array_split(np.array(run, dtype=object), 3)[which] if v is not None]
    return float(np.mean(found)) if found else None


def sweep_table(study: Study) -> str:
    """Returns every setting that the sweeps tried, the chosen one in bold."""
    sweep, out = RegimeSweep(study), []
    for arm, about in REGIME_ARMS.items():
        for knobs in sweep.grid(arm):
            row = sweep.rows.get(sweep.job(arm, knobs).key)
            if row is None or row["status"] != "finished":
                continue
            score = f"{100 * row['validation']:.1f}"
            if knobs == sweep.chosen(arm):
                score = f"**{score}**"
            told = ", ".join(f"{k} {v:g}" for k, v in knobs.items())
            out.append([about.label, told, score, f"{100 * row['validation_sampled']:.1f}"])
    return table(("arm", "settings", "best validation, greedy", "T = 1"), out) if out else NOTHING


def pilot_table(study: Study) -> str:
    """Returns the pilot's rows, best T = 1 first: last weights, 256 validation problems, one seed."""
    path = study.results / "regime_pilot.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    out = []
    for row in sorted(rows, key=lambda row: -row["last"]["T1"]):
        scores = (f"{100 * row['last'][key]:.1f}" for key in ("greedy", "T1", "pass8"))
        out.append([row["label"], *scores, f"{row['last']['waits']:.1f}", f"{row['expert_tokens'] / 1e3:.0f}"])
    header = ("arm and settings", "greedy", "T = 1", "pass@8", "wrong turns", "k expert tokens")
    return table(header, out) if out else NOTHING


def standing(study: Study) -> str:
    """Returns how much there is of each part, and which cells are empty."""
    found, s = Found(study), study.settings
    wanted = list({job.key: job for job in regime_jobs(study)}.values())
    done = study.part(PART).finished()
    hours = sum(row["cpu_seconds"] for row in done.values()) / 3600
    lines = [f"{sum(job.key in done for job in wanted)} of {len(wanted)} known runs, {hours:.1f} core-hours"]
    for corner, title in TITLES.items():
        arms = REGIME_ARMS if corner == HARD else MAIN
        have = [f"{REGIME_ARMS[arm].label} {_runs(rows)}" for arm in arms if (rows := found.runs[corner, arm])]
        empty = [REGIME_ARMS[arm].label for arm in arms if not found.runs[corner, arm]]
        lines.append(f"{title}: {'; '.join(have) or 'no run'}" + (f"; empty: {', '.join(empty)}" if empty else ""))
    swept = [REGIME_ARMS[arm].label for arm in REGIME_ARMS if found.tuned(arm)]
    failed = [row["key"] for row in study.part(PART).rows() if row["status"] == "failed"]
    lines.append(f"swept: {', '.join(swept) or 'no arm yet'}; seeds asked for: {len(s.seeds)}")
    lines.append(f"failed: {', '.join(failed) or 'none'}")
    return "\n".join(lines)


def regime_tables(study: Study) -> dict[str, str]:
    """Returns the regions of docs/study.md that are this study's."""
    return {
        "regimes-hard": hard_table(study),
        "regimes-corners": corners_table(study),
        "regimes-claims": claims_table(study),
        "regimes-courses": courses_table(study),
        "regimes-lock-in": lock_in_table(study),
        "regimes-pilot": pilot_table(study),
        "regimes-sweep": sweep_table(study),
        "regimes-status": f"```\n{standing(study)}\n```",
    }


def _runs(rows: Sequence[Row]) -> str:
    """Returns how many runs, and of how many bases where those are several."""
    bases = len({row["base_seed"] for row in rows})
    return f"{len(rows)}" + (f" ({bases} bases)" if bases > 1 else "")


def _largest(row: Row) -> str:
    return max(row["pass_at"], key=int)


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * np.mean(known):.1f}" if known else ""


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
