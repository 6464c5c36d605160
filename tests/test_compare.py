"""`trapo compare`: what is paired with what, and what is refused."""

import io
import json

import pytest
from rich.console import Console

from trapo.errors import TrapoError
from trapo.evaluation.compare import as_json, compare, table
from trapo.tools.terminal import print_table


def write(path, rewards):
    """rewards: problem id -> list of rewards, a response each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "reward": r, "text": "…"} for i, values in rewards.items() for r in values]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_answer_each_is_compared_by_the_problems_that_one_side_alone_got_right(tmp_path):
    a = write(tmp_path / "a.jsonl", {f"p{i}": [float(i < 4)] for i in range(20)})
    b = write(tmp_path / "b.jsonl", {f"p{i}": [float(i < 10 and i != 0)] for i in reversed(range(20))})
    (found,) = compare(a, b)
    assert (found.first, found.second, found.better, found.worse) == (0.2, 0.45, 6, 1)
    assert found.difference == pytest.approx(0.25)
    assert found.low < 0.25 < found.high
    # Of seven coins at most one on the rarer side: 2 · (1 + 7) / 2⁷.
    assert (found.test, found.p_value) == ("McNemar", pytest.approx(2 * 8 / 128))


def test_several_answers_each_are_compared_by_their_means_and_random_signs(tmp_path):
    a = write(tmp_path / "a.jsonl", {f"p{i}": [0.0, 1.0] for i in range(8)})
    b = write(tmp_path / "b.jsonl", {f"p{i}": [1.0, 1.0, 1.0, 0.0] for i in range(8)})
    (found,) = compare(a, b)
    assert found.difference == pytest.approx(0.25)
    assert (found.test, found.p_value) == ("sign flips", pytest.approx(2 / 2**8))


def test_folders_are_paired_by_the_names_of_their_evaluations(tmp_path):
    for side, reward in (("a", 0.0), ("b", 1.0)):
        for name in ("aime24", "math500"):
            write(tmp_path / side / "benchmarks" / f"{name}.jsonl", {"p": [reward]})
            (tmp_path / side / "benchmarks" / f"{name}.json").write_text("{}")
        write(tmp_path / side / "benchmarks" / "unfinished.jsonl", {"p": [reward]})
        write(tmp_path / side / "eval" / "step-000000.jsonl", {"p": [0.5]})
        write(tmp_path / side / "eval" / "step-000020.jsonl", {"p": [reward]})
    write(tmp_path / "b" / "eval.jsonl", {"p": [1.0]})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [(c.name, c.first, c.second) for c in found] == [
        ("aime24", 0, 1),
        ("math500", 0, 1),
        ("held-out", 0, 1),
    ]
    assert [c["name"] for c in as_json(found, "a", "b")["comparisons"]] == ["aime24", "math500", "held-out"]
    assert table(found, "a", "b").row_count == 3


def test_texts_may_hold_every_separator_of_lines(tmp_path):
    row = {"id": "p", "reward": 1, "text": "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (found,) = compare(path, path)
    assert found.problems == 1


def test_the_same_problems_from_a_copy_under_another_name_are_the_same(tmp_path):
    digests = [f"{i:016x}" for i in range(3)]
    a = write(tmp_path / "a.jsonl", {f"n1/{d}": [1.0] for d in digests})
    b = write(tmp_path / "b.jsonl", {f"n2/{d}": [0.0] for d in reversed(digests)})
    (found,) = compare(a, b)
    assert (found.problems, found.worse) == (3, 3)


def test_no_difference_on_few_problems_is_not_certain(tmp_path):
    a = write(tmp_path / "a.jsonl", {"p": [1.0], "q": [0.0]})
    (found,) = compare(a, a)
    assert found.difference == 0
    assert found.low < -0.2
    assert found.high > 0.2


def test_the_table_shows_points_and_keeps_its_digits_on_a_narrow_terminal(tmp_path):
    a = write(tmp_path / "a.jsonl", {f"p{i}": [0.0] for i in range(8)})
    b = write(tmp_path / "b.jsonl", {f"p{i}": [float(i < 2)] for i in range(8)})
    for width in (40, 60, 200):
        console = Console(width=width, file=io.StringIO())
        print_table(console, table(compare(a, b), "runs/a[b]", "runs/[/b]"))
        shown = console.file.getvalue()
        assert "…" not in shown
        assert "runs/a[b]" in shown
        assert "25.0%" in shown
        assert "+25.0 " in shown


@pytest.mark.parametrize(("failing", "named"), [("a", "A"), ("b", "B"), ("ab", "A and B"), ("", "")])
def test_a_side_whose_rewards_all_failed_is_said(failing, named, tmp_path):
    for side in "ab":
        status = "error" if side in failing else "ok"
        rows = [json.dumps({"id": f"p{i}", "reward": 0.0, "status": status}) for i in range(3)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join([*rows, ""]))
    found = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert found[0].all_failed == named
    console = Console(width=160, file=io.StringIO())
    print_table(console, table(found, "a", "b"))
    assert (f"every reward of {named} failed" in console.file.getvalue()) == bool(named)


@pytest.mark.parametrize("row", ["[" * 100_000, '{"id": "p"}', '{"id": "p", "reward": NaN}', "1", "\xff"])
def test_a_bad_row_is_named_in_one_line(row, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "p", "reward": 1}\n' + row.encode("latin-1") + b"\n")
    with pytest.raises(TrapoError, match=r"a\.jsonl:2: not a row with id and reward") as error:
        compare(path, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            {"p": [1], "q": [1]},
            {"p": [1], "r": [1], "s": [0]},
            r"1 only in .*a\.jsonl, 2 only in .*b\.jsonl, 1 in both",
        ),
        ({}, {"p": [1]}, r"a\.jsonl has no rows"),
    ],
)
def test_other_problems_and_empty_files_are_refused_in_one_line(a, b, message, tmp_path):
    with pytest.raises(TrapoError, match=message) as error:
        compare(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert "\n" not in str(error.value)


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(TrapoError, match="holds no evaluation"):
        compare(tmp_path, tmp_path)
    a, b = write(tmp_path / "a" / "eval.jsonl", {"p": [1]}), write(tmp_path / "b" / "eval" / "step-1.jsonl", {"p": [1]})
    write(tmp_path / "a" / "eval" / "other.jsonl", {"p": [1]})
    (found,) = compare(a.parent, b.parent.parent)  # one evaluation each: nothing else can be meant
    assert found.name == "eval / held-out"
    (tmp_path / "broken.jsonl").write_text('{"id": "p", "reward": 1}\n{"id": "q"}\n')
    with pytest.raises(TrapoError, match=r"broken\.jsonl:2: not a row with id and reward"):
        compare(tmp_path / "broken.jsonl", a)
