import io
import re

import pytest
from rich.console import Console

from trapo.report.display import Display

ROW = {
    "step": 3,
    "phase": "trapo",
    "reward": 0.25,
    "own_reward": 0.125,
    "reward_by_ratio": {"0": 0.125, "0.5": 0.75},
    "reward_failures": {"timeout": 2},
    "trsft_clipped": 0.12,
    "entropy": 1.5,
    "grad_norm": None,
    "tokens_per_second": 123.4,
    "seconds_left": 3725.0,
}


def shown(terminal, width=200, row=ROW):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with Display(console, total_steps=10, first_step=2, ratios=[0.0, 0.5, 1.0]) as display:
        display.announce("evaluating 8 problems")
        display.status("training")
        display.note("held-out accuracy [/b] 20%")  # brackets are text, not markup
        display.update(row)
    return console.file.getvalue()


def test_a_terminal_gets_a_table_of_steps_and_a_progress_bar():
    text = shown(terminal=True)
    for part in ("reward@0.5", "TrSFT clipped", "0.75", "12%", "1.50", "123", "1:02:05", "3/10", "done"):
        assert part in text


def test_a_log_gets_one_header_and_one_line_a_step():
    first, *lines = shown(terminal=False).splitlines()
    assert first == "evaluating 8 problems ..."  # what takes long is said in a log too
    assert lines[0] == "held-out accuracy [/b] 20%"
    assert lines[1].split()[:4] == ["step", "phase", "own", "reward"]
    assert len(lines) == 3
    # Failed rewards are shown; what a step does not have is a dash.
    assert lines[2].split() == ["3", "trapo", "0.12", "0.75", "-", "12%", "1.50", "-", "2", "123", "1:02:05"]


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_a_narrow_terminal_gets_fewer_and_shorter_columns_and_no_cut_ones(width):
    lines = re.sub("\x1b\\[[?0-9;]*[A-Za-z]", "", shown(terminal=True, width=width)).splitlines()  # no control codes
    header = next(line for line in lines if line.lstrip().startswith("step"))
    assert "…" not in "".join(lines)
    assert max(map(len, lines[-4:])) <= width
    assert {"step", "own"} <= set(header.split())
    if width == 80:
        assert {"@0.5", "@1", "clip", "entropy", "failed", "tok/s"} <= set(header.split())


def test_the_columns_of_a_log_stand_below_their_titles():
    header, line = shown(terminal=False, row=ROW | {"phase": "fixed_prefix"}).splitlines()[2:]
    assert len(header) == len(line)
    assert header.index("phase") + len("phase") == line.index("fixed_prefix") + len("fixed_prefix")
