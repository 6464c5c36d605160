import json
import re

import pytest
from report_runs import HOSTILE, full_row, rollout, row, write_run

from trapo.errors import TrapoError
from trapo.report.run_data import read_run
from trapo.report.write import write_comparison, write_report


def figures_in(page):
    """The figures that the page would draw, by title."""
    found = re.search(r'id="figures"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    return {figure["title"]: figure for figure in json.loads(found[1])}


def lines(figure):
    return {trace["name"]: trace["y"] for trace in figure["traces"]}


def test_the_picture_and_the_numbers_behind_it_are_written(tmp_path):
    rows = [row(1), row(2, reward_by_ratio={"0": 0.5}, rollouts_by_ratio={"0": 8}, entropy=None)]
    write_report(write_run(tmp_path / "run", rows, accuracies=[(0, 0.25)]))
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert data["reward_by_ratio"] == {"0": [0.2, 0.5], "0.5": [0.9, None]}
    assert data["series"]["entropy"] == [0.7, None]
    assert data["evaluations"][0]["accuracy"] == 0.25


def test_the_page_has_a_figure_for_everything_that_was_measured(tmp_path):
    run = write_run(tmp_path / "run", [full_row(s) for s in range(1, 9)], accuracies=[(0, 0.2), (8, 0.4)])
    figures = figures_in(write_report(run))
    assert {
        "Held-out accuracy",
        "Own reward",
        "Reward of all rollouts, expert text too",
        "Guidance used",
        "Reward by guidance level",
        "Expert tokens inside the trust region",
        "Expert tokens by probability",
        "Expert tokens by probability over time",
        "Entropy",
        "Length of the model's own part",
        "Throughput",
        "Time of a step by part",
        "Peak memory",
    } <= figures.keys()
    accuracy = figures["Held-out accuracy"]["traces"][0]
    assert (accuracy["x"], accuracy["y"]) == ([0, 8], [0.2, 0.4])
    assert accuracy["error_y"]["array"] == pytest.approx([0.07, 0.07])
    assert accuracy["error_y"]["arrayminus"] == pytest.approx([0.05, 0.05])
    assert lines(figures["Guidance used"]) == {"no prefix": [6] * 8, "prefix 50%": [2] * 8}
    assert list(lines(figures["Time of a step by part"])) == ["generate", "reward", "logprobs", "update"]


def test_the_histogram_is_shown_as_shares_against_alpha(tmp_path):
    run = write_run(tmp_path / "run", [full_row(s) for s in range(1, 10)], overrides=["objective.alpha=0.2"])
    figure = figures_in(write_report(run))["Expert tokens by probability"]
    early, late = lines(figure).values()
    assert sum(early) == pytest.approx(1)
    # Steps 1 to 3 have 19 + 18 + 17 tokens in the lowest bin, of 62 a step; steps 7 to 9 have 13 + 12 + 11.
    assert early[0] == pytest.approx(54 / 186)
    assert late[0] == pytest.approx(36 / 186)
    assert figure["layout"]["shapes"][0]["x0"] == 0.2
    over_time = figures_in(run / "report.html")["Expert tokens by probability over time"]["traces"][0]
    assert over_time["z"][0][0] ** 2 == pytest.approx(19 / 62)  # [bin][step]
    assert over_time["text"][0][0] == "30.6%"
    assert len(over_time["y"]) == len(over_time["z"]) == 20


def test_alpha_is_not_shown_where_the_loss_has_none(tmp_path):
    assert read_run(write_run(tmp_path / "grpo", [row(1)], overrides=["mode=grpo"])).alpha is None
    assert read_run(write_run(tmp_path / "trapo", [row(1)])).alpha == 0.1


def test_several_runs_share_the_figures_and_are_told_apart(tmp_path):
    a = write_run(tmp_path / "a" / "run", [full_row(1), full_row(2)], accuracies=[(2, 0.3)])
    b = write_run(tmp_path / "b" / "run", [row(1)], overrides=["optim.lr=0.5"], accuracies=[(2, 0.4)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page = write_comparison([a, b], tmp_path / "both.html")
    figures = figures_in(page)
    assert lines(figures["Reward of all rollouts, expert text too"]) == {"a/run": [0.325, 0.35], "b/run": [0.4]}
    assert set(lines(figures["Held-out accuracy"])) == {"a/run", "b/run"}
    assert {"Guidance used · a/run", "Guidance used · b/run"} <= figures.keys()
    text = page.read_text()
    assert "1 in which the runs differ" in text
    assert text.index("optim.lr") < text.index("optim.betas")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before | {page: page.read_bytes()}  # nothing is written into the runs


def test_the_parts_of_a_steps_time_add_up_to_the_step(tmp_path):
    steps = [full_row(1), full_row(2)]
    drawn = lines(figures_in(write_report(write_run(tmp_path / "run", steps)))["Time of a step by part"])
    assert [sum(values) for values in zip(*drawn.values(), strict=True)] == [r["seconds_step"] for r in steps]


def test_the_time_between_steps_has_its_parts_and_a_run_its_sums(tmp_path):
    steps = [full_row(1) | {"seconds_evaluate": 4.0, "seconds_sync": 1.0}, full_row(2) | {"seconds_sync": 2.0}]
    by_part = {"generate": 10.0, "update": 15.0, "evaluate": 9.0, "save": 0.0}
    done = write_run(tmp_path / "done", steps)
    (done / "summary.json").write_text(
        json.dumps({"mode": "trapo", "model": "m", "steps": 2, "seconds": 40, "seconds_by_part": by_part})
    )
    figures = figures_in(write_report(done))
    assert lines(figures["Time of a step by part"])["evaluate"] == [4.0, None]
    drawn = figures["Time of the run by part"]
    assert lines(drawn) == {"generate": [10.0], "update": [15.0], "evaluate": [9.0]}
    assert drawn["traces"][-1]["text"] == ["evaluate 26%"]
    going = write_run(tmp_path / "going", steps)
    sums = lines(figures_in(write_report(going))["Time of the run by part"])
    assert (sums["sync"], sums["generate"]) == ([3.0], [10.0])


def test_what_an_older_run_did_not_record_is_left_out(tmp_path):
    figures = figures_in(write_report(write_run(tmp_path / "run", [row(1, seconds_collect=2.0, seconds_update=3.0)])))
    assert "Expert tokens by probability" not in figures
    assert "Peak memory" not in figures
    assert lines(figures["Time of a step by part"]) == {"collect": [2.0], "update": [3.0]}


def test_a_run_of_one_step_without_evaluation_can_be_drawn(tmp_path):
    assert write_report(write_run(tmp_path / "run", [row(1, reward=None, trsft_clipped=None)])).exists()


@pytest.mark.filterwarnings("error")
def test_an_sft_run_without_rewards_can_be_drawn(tmp_path):
    sft = {"reward": None, "reward_by_ratio": {}, "rollouts_by_ratio": {"1": 32}, "guided": 1.0}
    steps = [full_row(step) | sft | {"generated_length": None} for step in (1, 2, 3)]
    run = write_run(tmp_path / "run", steps, accuracies=[(0, 0.2), (3, 0.3)], overrides=["mode=sft"])
    assert lines(figures_in(write_report(run))["Guidance used"]) == {"prefix 100%": [32, 32, 32]}
    assert json.loads((run / "report.json").read_text())["rollouts_by_ratio"] == {"1": [32, 32, 32]}


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(TrapoError, match="holds no steps"):
        write_report(tmp_path)


def test_text_of_rollouts_and_settings_is_escaped(tmp_path):
    rollouts = [rollout(1, prompt=HOSTILE, prefix=HOSTILE, own=HOSTILE, answer=HOSTILE, status=HOSTILE)]
    run = write_run(tmp_path / "<b>run", [row(1)], rollouts=rollouts)
    with open(run / "config.yaml", "a") as file:
        file.write(f"note: {json.dumps(HOSTILE)}\n")
    text = write_report(run).read_text()
    assert "<script>window" not in text
    assert "<img" not in text
    assert "<b>run" not in text
    assert text.count("&lt;script&gt;window.hacked = true&lt;/script&gt;") >= 6
    assert "{{ 7 * 7 }}" in text


def test_the_page_holds_samples_of_the_whole_run_and_the_ends_of_long_texts(tmp_path):
    rollouts = [rollout(step, own=f"step {step} {'x' * 9000} END") for step in range(1, 401) for _ in range(4)]
    text = write_report(write_run(tmp_path / "run", [row(1)], rollouts=rollouts)).read_text()
    shown = [int(step) for step in re.findall(r'class="group".* data-step="(\d+)"', text)]
    assert len(shown) == 20
    assert (shown[0], shown[-1]) == (1, 400)
    assert text.count(" END</span>") == 80
    assert "characters …]" in text


def test_own_reward_is_that_of_rollouts_without_a_prefix_in_old_rows_too(tmp_path):
    rows = [row(1, reward_by_ratio={"0": 0.2, "1": 1.0}), row(2, own_reward=0.3), row(3, reward_by_ratio={})]
    assert read_run(write_run(tmp_path / "run", rows)).series("own_reward") == [0.2, 0.3, None]


def test_shares_that_a_row_does_not_hold_follow_from_those_that_it_holds(tmp_path):
    clipped = {"clip_low": 0.1, "clip_high": 0.2, "clip_dual": None, "trsft_clipped": 0.25}
    figures = figures_in(write_report(write_run(tmp_path / "run", [row(1, **clipped), row(2, trsft_clipped=None)])))
    assert lines(figures["Own tokens past the clip"])["run"] == [pytest.approx(0.3), None]
    assert lines(figures["Expert tokens inside the trust region"])["run"] == [0.75, None]


def test_a_ratio_that_is_always_1_has_no_figures(tmp_path):
    zeros = {"clip_low": 0.0, "clip_high": 0.0, "kl_old_k3": 0.0, "kl_ref_k3": 0.5}
    figures = figures_in(write_report(write_run(tmp_path / "run", [row(1, **zeros)])))
    assert "KL to the reference" in figures
    assert not {"Own tokens past the clip", "KL from the policy that sampled"} & figures.keys()


def test_one_level_has_one_colour_in_every_run_of_a_page(tmp_path):
    few = write_run(tmp_path / "few", [row(1)])
    levels = {"0": 4, "0.2": 2, "0.5": 1, "1": 1}
    many = write_run(tmp_path / "many", [row(1, rollouts_by_ratio=levels, reward_by_ratio=dict.fromkeys(levels, 0.5))])
    figures = figures_in(write_comparison([few, many], tmp_path / "both.html"))
    colours = {}
    for title, figure in figures.items():
        if title.startswith(("Guidance used", "Reward by guidance level")):
            for trace in figure["traces"]:
                colours.setdefault(trace["name"], set()).add(trace["line"]["color"])
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(colours, 1)
    assert len({found.pop() for found in colours.values()}) == 4


def group(text, step):
    """The part of a page that shows the group of a step."""
    (found,) = re.findall(rf'<article class="group" [^>]*data-step="{step}".*?</article>', text, re.DOTALL)
    return found


def test_a_group_says_what_became_of_the_prompt_with_and_without_a_prefix(tmp_path):
    def made(step, level, ratio, reward, **more):
        return rollout(step, group=3, level=level, ratio=ratio, reward=reward, prefix="Tom" if ratio else "", **more)

    mixed = [
        made(1, 0, 0.0, 0.0),
        made(1, 0, 0.0, 1.0),
        made(1, 1, 0.5, 1.0),
        made(1, 2, 1.0, 1.0, own_tokens=0, own=""),
    ]
    text = write_report(
        write_run(
            tmp_path / "run", [row(1)], rollouts=[*mixed, made(2, 0, 0.0, 0.1), made(3, 0, 0.0, None, advantage=None)]
        )
    ).read_text()
    first, second, third = (group(text, step) for step in (1, 2, 3))
    assert 'data-outcome="some right"' in first
    assert 'data-levels="no prefix|prefix 100%|prefix 50%"' in first
    assert 'data-own="0.5" data-gain="0.5"' in first  # the whole trace is none of the model's
    assert re.findall(r"micro-group (\d)(?: · (\d) of (\d) right)?", first) == [
        ("1", "1", "2"), ("2", "1", "1"), ("3", "1", "1")
    ]  # fmt: skip
    assert first.count('class="prompt"') == 1
    assert ('data-outcome="none right"' in second, "◐ reward 0.1" in second, "not guided" in second) == (True,) * 3
    assert ('data-outcome="not scored"' in third, 'data-own=""' in third, "reward" in third) == (True, True, False)


def test_examples_in_a_prompt_are_folded_and_the_question_is_not(tmp_path):
    chat = "user: 1 + 1?\n\nassistant: 2\n\nuser: 3 + 4?"
    shown = [rollout(1, prompt=chat), rollout(2, prompt="Say\n\nuser: hello")]
    text = write_report(write_run(tmp_path / "run", [row(1)], rollouts=shown)).read_text()
    first, second = group(text, 1), group(text, 2)
    assert '<p class="prompt">3 + 4?</p>' in first
    assert re.search(r"<details.*1 \+ 1\?.*assistant: 2.*</details>", first, re.DOTALL)
    assert "<details" not in second
    assert '<p class="prompt">Say\n\nuser: hello</p>' in second


def test_an_accuracy_whose_file_is_gone_is_taken_from_the_summary(tmp_path):
    run = write_run(tmp_path / "run", [row(1)])
    summary = {"mode": "trapo", "model": "m", "steps": 1, "seconds": 2.0, "eval_before": 0.25, "eval_after": 0.5}
    summary |= {"eval_before_interval": [0.2, 0.3], "eval_after_interval": [0.4, 0.6]}
    text = write_report(run, summary).read_text()
    assert "25.0%<small>20.0% to 30.0%</small>" in text
    assert "50.0%<small>40.0% to 60.0%</small>" in text


def test_runs_that_differ_in_their_seeds_alone_are_named_together(tmp_path):
    def made(name, *overrides):
        return write_run(tmp_path / name, [row(1, generated_tokens=10, trained_tokens=5), row(2)], overrides=overrides)

    runs = [made("a", "seed=1"), made("b", "seed=2"), made("other", "seed=2", "optim.lr=0.5")]
    text = write_comparison(runs, tmp_path / "all.html").read_text()
    axes = json.loads(re.search(r'id="axes"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert [axes[name]["repeats"] for name in ("a", "b", "other")] == ["a and 1 more of its kind"] * 2 + [""]
    assert axes["a"]["tokens"] == [15, 15]
    assert 'id="seeds"' in text
    assert 'id="seeds"' not in write_comparison(runs[1:], tmp_path / "two.html").read_text()
