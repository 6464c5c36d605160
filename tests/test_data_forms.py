"""The layouts and file types that people bring: chats, TRL's, MATH's, JSON and CSV, and columns for rewards."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from trapo.config import merge_config
from trapo.data.encode import EncodedProblem, PromptEncoder, set_chat_template
from trapo.data.loading import load_problems
from trapo.data.problem import DataError
from trapo.data.sampling import note_shared
from trapo.errors import TrapoError
from trapo.rewards.functions import resolve
from trapo.rewards.scoring import score_texts

USER, SAYS = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "1 + 1 = 2\n#### 2"}


def write(folder, *rows):
    path = folder / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answer", "traces"),
    [
        ({"messages": [USER, SAYS]}, SAYS["content"], (SAYS["content"],)),
        ({"messages": [USER, SAYS], "answer": "2"}, "2", (SAYS["content"],)),
        ({"messages": [USER], "answer": 2}, "2", ()),
        ({"prompt": "1 + 1?", "completion": "so 2"}, "so 2", ("so 2",)),
        ({"prompt": [USER], "completion": [SAYS], "answer": "2"}, "2", (SAYS["content"],)),
        ({"problem": "1 + 1?", "answer": "2", "solution": "add"}, "2", ("add",)),
        ({"problem": "1 + 1?", "answer": "2"}, "2", ()),
    ],
)
def test_a_layout_of_the_field_is_read_as_it_is_meant(tmp_path, row, answer, traces):
    (problem,) = load_problems(write(tmp_path, row))
    assert problem.prompt == (USER,)
    assert (problem.answer, problem.traces) == (answer, traces)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "column 'messages' must be a list of"),
        ({"messages": [[USER, SAYS]]}, "column 'messages' must be a list of"),
        ({"messages": []}, "column 'messages' must be a list of"),
        ({"messages": [USER]}, "column 'answer' is missing"),
        ({"messages": [SAYS]}, "column 'prompt' must be a text or a list of"),
        ({"prompt": "?", "completion": " "}, "column 'completion' must be a text"),
        ({"prompt": "?", "completion": [USER]}, "column 'completion' must be a text"),
    ],
)
def test_what_is_no_such_layout_is_refused_with_its_column(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_problems(write(tmp_path, row))


ROWS = [{"prompt": 'say "a,\nb"', "answer": "é", "trace": "t", "level": "3"}, {"prompt": "?", "answer": "2"}]


@pytest.mark.parametrize("form", ["list", "named"])
def test_json_holds_a_list_of_rows_or_one_list_under_a_name(tmp_path, form):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(ROWS if form == "list" else {"version": 1, "data": ROWS}))
    lines = load_problems(write(tmp_path, *ROWS))
    assert load_problems(path) == lines
    assert len(lines) == 2


def test_csv_gives_what_jsonl_gives_and_an_empty_cell_is_nothing(tmp_path):
    import csv

    path = tmp_path / "toy.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["prompt", "answer", "trace", "level"])
        table.writeheader()
        table.writerows(ROWS)
    first, second = load_problems(path)
    assert (first, second) == tuple(load_problems(write(tmp_path, *ROWS)))
    assert first.row == {"level": "3"}
    assert second.traces == ()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"prompt": 1}\n{"prompt": 2}', r"not JSON: .*one object a line is \.jsonl"),
        ("a.json", '{"a": [], "b": []}', "must hold a list of objects; got a record"),
        ("a.json", "[1]", "row 1: each row must be an object; got int 1"),
        ("a.json", "[]", "no problems in it"),
        ("a.csv", "prompt,answer\n1\n", "row 2: has another number of cells than the 2 names above"),
        ("a.csv", "prompt,answer\n1,2,3\n", "row 2: has another number of cells"),
        ("a.csv", 'prompt,answer\n"1,2\n', "not a CSV file in UTF-8"),
        ("a.csv", "", "no problems in it"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_problems(tmp_path / name)
    assert "\n" not in str(caught.value)


class Pool:
    """Calls a function in this process, as a worker does."""

    def __init__(self, function):
        self.function, self.wants_row = function, function.wants_row

    def score(self, items):
        return [self.function(*item) for item in items]


@pytest.mark.parametrize(
    "source",
    [
        "def f(text, answer, **row): return float(row['level'] == 3 and row['id'] == 'a' and 'answer' not in row)",
        "def f(text, answer, level=None, colour='none'): return float(level == 3 and colour == 'none')",
        "def f(completions, answer, **columns): return [float(columns['level'] == [3] and columns['unit'] == ['m'])]",
        "def f(data_source, solution_str, ground_truth, extra_info): return float(extra_info['unit'] == 'm')",
    ],
)
def test_a_reward_gets_the_other_columns_of_its_row(tmp_path, source, monkeypatch):
    (tmp_path / "columns_of_rows.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    resolve.cache_clear()
    problems = load_problems(write(tmp_path, {"prompt": "?", "answer": "2", "id": "a", "level": 3, "unit": "m"}))
    assert score_texts(Pool(resolve("./columns_of_rows.py:f")), ["x"], problems) == [1.0]


def test_a_base_model_gets_a_chat_template_by_a_file_or_by_plain(tmp_path, tokenizer):
    import copy

    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    with pytest.raises(TrapoError, match=r"no chat template, .*data\.chat_template gives one: a Jinja file, or plain"):
        PromptEncoder(base)
    (problem,) = load_problems(write(tmp_path, {"prompt": "1 + 1?", "answer": "2"}))
    set_chat_template(base, "plain")
    assert base.decode(PromptEncoder(base).encode(problem)) == "1 + 1?\n\n"
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:")
    set_chat_template(base, str(template))
    assert base.decode(PromptEncoder(base).encode(problem)) == "Q: 1 + 1?\nA:"
    with pytest.raises(TrapoError, match=r"data\.chat_template: './no' cannot be read .*; a file, or plain"):
        set_chat_template(base, "./no")


def test_problems_that_are_trained_on_and_held_out_are_counted(tmp_path):
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1, "id": f"r{i}"} for i in range(4)]
    train = [EncodedProblem(p, (1,), ()) for p in load_problems(write(tmp_path, *rows[:3]))]
    same = [EncodedProblem(p, (1,), ()) for p in load_problems(write(tmp_path, *[{**r, "id": "x"} for r in rows[1:]]))]
    said = []
    note_shared(train, same, said.append)
    assert said == [
        "WARNING: data.eval: 2 of 3 problems are in data.train too; accuracy on them is not that of new ones"
    ]
    note_shared(train, same[2:], said.append)
    note_shared(train, None, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(4, (1, 1, 1, 1)), (6, (3, 1, 1, 1)), (8, (4, 2, 1, 1)), (16, (8, 4, 2, 2)), (32, (16, 8, 4, 4))],
)
def test_one_number_is_split_as_the_papers_eight(size, sizes):
    from trapo.modes import phases

    (phase,) = phases(merge_config({}, [f"guidance.group_size={size}"]))
    assert tuple(group.size for group in phase.schedule.micro_groups) == sizes
    (grpo,) = phases(merge_config({}, [f"guidance.group_size={size}", "mode=grpo"]))
    assert grpo.schedule.rollouts_per_prompt == size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guidance.group_size=3"], r"^guidance\.group_size: got 3; at least 4, one for each micro-group$"),
        (["guidance.group_size=8", "guidance.sizes=[8]"], r"^guidance\.group_size: got 8 beside guidance\.sizes=\[8\]"),
        (["guidance.group_size=8", "guidance.ratios=[0,1]"], r"with 2 guidance\.ratios; the preset has 4"),
    ],
)
def test_a_group_size_that_cannot_be_split_is_refused(overrides, message):
    from trapo.modes import phases

    with pytest.raises(TrapoError, match=message):
        phases(merge_config({}, overrides))


def test_a_plan_fits_or_does_not_and_takes_what_its_arithmetic_takes():
    from trapo.models.gpus import GPUS, generation_seconds, update_seconds, verdict

    step = SimpleNamespace(sequences=16, prompt=100, response=1000)
    flops = SimpleNamespace(total=8 * 0.4 * 989e12 * 30)
    plan = SimpleNamespace(ranks=8, memory={"a": 2**30 * 40, "b": 2**30 * 20}, flops=flops, step=step)
    plan.parameters, plan.kv_bytes = 7_000_000_000, 1000
    assert verdict(plan, GPUS["h100"]) == "yes: 60.0 of 79.6 GiB"
    plan.memory["b"] += 2**30 * 19
    assert verdict(plan, GPUS["h100"]).startswith("hardly: 79.0 of 79.6 GiB")
    plan.memory["b"] += 2**30
    assert verdict(plan, GPUS["h100"]) == "no: 80.0 of 79.6 GiB"
    assert update_seconds(plan, GPUS["h100"]) == pytest.approx(30)
    # 1000 tokens, each of which reads 14 GB and the 600 tokens of two sequences.
    assert generation_seconds(plan, GPUS["h100"]) == pytest.approx(1000 * (14e9 + 2 * 1000 * 600) / 3.35e12)
