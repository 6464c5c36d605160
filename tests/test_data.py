"""Reading problems: three layouts, two file types, generated sets, and errors a person can act on."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trapo.config import merge_config
from trapo.data.loading import load_problems
from trapo.data.problem import DataError, Problem, problem_id
from trapo.errors import TrapoError
from trapo.rewards import math_reward

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]


def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def parquet(path, *rows):
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}")
    return SHARED / name


# ------------------------------------------------------------------------------------------------ our layout


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_our_layout_reads_the_same_from_both_file_types(tmp_path, write):
    path = tmp_path / f"toy.{write.__name__}"
    row = {"prompt": CHAT, "answer": "2", "traces": ["1 + 1 = 2\n#### 2", "#### 2"], "id": "a", "source": "s"}
    assert load_problems(write(path, row)) == [
        Problem("a", tuple(CHAT), "2", ("1 + 1 = 2\n#### 2", "#### 2"), "s"),
    ]


def test_a_text_prompt_is_one_user_message_and_the_rest_is_optional(tmp_path):
    (problem,) = load_problems(jsonl(tmp_path / "toy.jsonl", {"prompt": "1 + 1?", "answer": 2}))
    assert problem == Problem(
        problem_id("toy", "1 + 1?", "2"), ({"role": "user", "content": "1 + 1?"},), "2", (), "toy"
    )


def test_one_trace_may_stand_alone(tmp_path):
    rows = [{"prompt": "?", "answer": "2", "trace": "#### 2"}, {"prompt": "?", "answer": "2", "trace": None}]
    assert [p.traces for p in load_problems(jsonl(tmp_path / "toy.jsonl", *rows))] == [("#### 2",), ()]


def test_the_two_columns_of_traces_go_together(tmp_path):
    rows = [
        {"prompt": "?", "answer": "2", "traces": None, "trace": "a"},
        {"prompt": "?", "answer": "2", "traces": ["a", "b", "a"], "trace": "c"},
        {"prompt": "?", "answer": "2", "traces": ["a", "b"], "trace": "b"},
        {"prompt": "?", "answer": "2", "traces": [], "trace": None},
    ]
    expected = [("a",), ("a", "b", "a", "c"), ("a", "b"), ()]
    for write in (jsonl, parquet):
        assert [p.traces for p in load_problems(write(tmp_path / f"toy.{write.__name__}", *rows))] == expected


def test_rows_of_plain_json_read_back_the_same(tmp_path):
    problems = [
        Problem("é/1", tuple(CHAT), "½", ("a\nb", "a\u2028b"), "x"),
        Problem("2", ({"role": "user", "content": "q"},), "2", (), "y"),
    ]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems), "utf-8")
    assert load_problems(path) == problems


# ---------------------------------------------------------------------------------------------------- GSM8K


def test_gsm8k_gives_the_number_as_answer_and_the_solution_without_marks_as_trace(tmp_path):
    row = {"question": "How many?", "answer": "He has 2*600=<<2*600=1200>>1200.\n#### 1,200"}
    (problem,) = load_problems(jsonl(tmp_path / "train.jsonl", row))
    assert problem.prompt == ({"role": "user", "content": "How many?"},)
    assert problem.answer == "1200"
    assert problem.traces == ("He has 2*600=1200.\n#### 1200",)
    assert problem.source == "gsm8k"


def test_gsm8k_without_a_final_answer_is_a_bad_row(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"question": "How many?", "answer": "Two."})
    with pytest.raises(DataError, match=r"train.jsonl:1: column 'answer' must end in '#### n'; got 'Two.'"):
        load_problems(path)


@pytest.mark.parametrize(("name", "rows"), [("gsm8k-train.jsonl", 7473), ("gsm8k-test.jsonl", 1319)])
def test_the_real_gsm8k_reads_whole_and_its_traces_earn_their_reward(name, rows):
    problems = load_problems(shared(name))
    assert len(problems) == rows
    assert not any("<<" in t or "," in p.answer for p in problems for t in p.traces)
    assert all(math_reward(p.traces[0], p.answer) == 1.0 for p in problems)


def test_a_question_beside_the_prompt_that_was_made_of_it_is_not_gsm8k(tmp_path):
    row = {"question": "1 + 1?", "prompt": "Compute 1 + 1.", "answer": "2"}
    (problem,) = load_problems(jsonl(tmp_path / "toy.jsonl", row))
    assert (problem.prompt[0]["content"], problem.answer) == ("Compute 1 + 1.", "2")
    (problem,) = load_problems(jsonl(tmp_path / "toy.jsonl", {**row, "answer": "One and one.\n#### 2"}))
    assert (problem.prompt[0]["content"], problem.answer, problem.source) == ("1 + 1?", "2", "gsm8k")


# ----------------------------------------------------------------------------------------------------- verl


def test_verl_reads_chat_answer_source_and_every_kind_of_trace(tmp_path):
    row = {
        "data_source": "openr1",
        "prompt": CHAT,
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "target": [{"role": "assistant", "content": "first"}],
        "target_2": "second",
        "extra_info": {"index": 0, "traces": ["third", ""]},
    }
    (problem,) = load_problems(parquet(tmp_path / "train.parquet", row))
    assert problem.prompt == tuple(CHAT)
    assert (problem.answer, problem.source) == ("2", "openr1")
    assert problem.traces == ("first", "second", "third")


def test_verl_columns_that_describe_the_target_are_no_traces(tmp_path):
    model = {"ground_truth": "2"}
    about = {"target_lang": "en", "target-style": "terse", "target_length": 5, "extra_info": {"target_length": 5}}
    chat = {"target_qwen": [{"role": "assistant", "content": "kept"}]}
    (problem,) = load_problems(jsonl(tmp_path / "t.jsonl", {"prompt": CHAT, "reward_model": model, **about, **chat}))
    assert problem.traces == ("kept",)


@pytest.mark.parametrize(
    ("name", "rows", "different"),
    [
        ("aime.parquet", 960, 30),
        ("aime25.parquet", 960, 30),
        ("amc.parquet", 2656, 83),
        ("math.parquet", 500, 500),
        ("minerva.parquet", 272, 272),
        ("olympiad_bench.parquet", 675, 675),
    ],
)
def test_the_real_verl_files_read_whole_and_once_each_with_dedup(name, rows, different):
    assert len(load_problems(shared(name))) == rows
    problems = load_problems(shared(name), dedup=True)
    assert len(problems) == len({p.id for p in problems}) == different
    assert all(p.prompt[-1]["role"] == "user" and p.answer for p in problems)


@pytest.mark.parametrize("name", ["aime.parquet", "amc.parquet", "math.parquet", "olympiad_bench.parquet"])
def test_the_answers_of_the_real_verl_files_equal_themselves(name):
    problems = load_problems(shared(name), dedup=True)
    boxed = [rf"So \boxed{{{p.answer.replace('$', '')}}}." for p in problems]
    wrong = [p.answer for p, text in zip(problems, boxed, strict=True) if math_reward(text, p.answer) != 1.0]
    assert len(wrong) <= 0.01 * len(problems), wrong


# ------------------------------------------------------------------------------------------------- generated


def test_a_task_address_generates():
    problems = load_problems("task://word_problems?split=test&n=7&seed=1&difficulty=easy")
    assert len(problems) == 7
    assert {p.source for p in problems} == {"word_problems/test"}
    assert problems != load_problems("task://word_problems?split=test&n=7&seed=2&difficulty=easy")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("task://sudoku?split=train&n=1", "no such task; accepted: task://word_problems"),
        ("task://word_problems?n=1", "option 'split' is missing"),
        ("task://word_problems?split=train&n=1&sed=1", "unknown option 'sed'"),
        ("task://word_problems?split=dev&n=1", "split must be one of train, test; got 'dev'"),
        ("task://word_problems?split=train&n=many", "'many'"),
        ("task:word_problems", "no such task"),
    ],
)
def test_a_wrong_task_address_says_what_is_accepted(address, message):
    with pytest.raises(DataError, match=message) as caught:
        load_problems(address)
    assert "accepted: task://word_problems?split=train" in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- options


def test_a_system_prompt_replaces_or_removes_the_own_one_and_keeps_the_id(tmp_path):
    path = jsonl(tmp_path / "toy.jsonl", {"prompt": CHAT, "answer": "2"})
    (kept,), (replaced,), (removed,) = (load_problems(path, system_prompt=s) for s in (None, "New.", ""))
    assert kept.prompt == tuple(CHAT)
    assert replaced.prompt == ({"role": "system", "content": "New."}, CHAT[1])
    assert removed.prompt == (CHAT[1],)
    assert kept.id == replaced.id == removed.id


def test_a_prompt_suffix_goes_to_the_last_message_only(tmp_path):
    path = jsonl(tmp_path / "toy.jsonl", {"prompt": CHAT, "answer": "2"})
    (problem,) = load_problems(path, prompt_suffix=" Think.")
    assert [m["content"] for m in problem.prompt] == ["Be brief.", "1 + 1? Think."]


def test_dedup_goes_by_question_and_answer_and_comes_before_the_limit(tmp_path):
    rows = [{"prompt": q, "answer": a} for q, a in [("x", "1"), ("x", "1"), ("x", "2"), ("y", "1"), ("z", "1")]]
    path = jsonl(tmp_path / "toy.jsonl", *rows)
    assert len(load_problems(path)) == 5
    found = load_problems(path, dedup=True, limit=3)
    assert [(p.prompt[0]["content"], p.answer) for p in found] == [("x", "1"), ("x", "2"), ("y", "1")]


def test_dedup_goes_by_content_also_where_rows_have_ids(tmp_path):
    rows = [{"id": i, "prompt": q, "answer": "1"} for i, q in [("a", "x"), ("b", "x"), ("a", "y"), (7, "z")]]
    found = load_problems(jsonl(tmp_path / "toy.jsonl", *rows), dedup=True)
    assert [p.prompt[0]["content"] for p in found] == ["x", "y", "z"]
    assert len({p.id for p in found}) == 3
    assert found[2].id == "7"


def test_an_id_that_is_a_category_is_told_apart_by_content_in_any_order(tmp_path):
    rows = [{"id": "algebra", "prompt": q, "answer": "1"} for q in ("x", "y", "x")]
    found = load_problems(jsonl(tmp_path / "toy.jsonl", *rows))
    assert found[0].id == found[2].id != found[1].id
    assert all(p.id.startswith("algebra/") for p in found)
    other = load_problems(jsonl(tmp_path / "other.jsonl", *reversed(rows[:2])))
    assert {p.id for p in other} == {p.id for p in found}


@pytest.mark.parametrize("options", [{"limit": 0}, {"on_bad_row": "ignore"}])
def test_impossible_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_problems(tmp_path / "toy.jsonl", **options)


# ---------------------------------------------------------------------------------------------------- errors


GOOD = {"prompt": "?", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "not JSON: "),
        ("[1, 2]", "each line must be a JSON object; got a list [1, 2]"),
        ({"prompt": "?"}, "column 'answer' is missing; columns found: prompt"),
        ({"prompt": "?", "answer": None}, "column 'answer' is missing"),
        ({"prompt": "?", "answer": " "}, "column 'answer' must be a text or a number; got text ' '"),
        ({"prompt": "?", "answer": True}, "column 'answer' must be a text or a number; got true or false True"),
        ({"prompt": "", "answer": "2"}, "column 'prompt' must be a text that is not empty; got text ''"),
        ({"prompt": [], "answer": "2"}, "column 'prompt' must be a text or a list of {role, content}; got a list []"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "column 'prompt' must be a text or a list of {role, content}"),
        ({"prompt": CHAT[:1], "answer": "2"}, "must end with a user message; got role 'system'"),
        ('{"prompt": "?", "answer": NaN}', "column 'answer' must be a text or a finite number; got nan"),
        ('{"prompt": "?", "answer": 1e999}', "column 'answer' must be a text or a finite number; got inf"),
        ('{"prompt": "a \\ud83d", "answer": "2"}', "column 'prompt' holds half a character (\\ud83d)"),
        ('{"prompt": "?", "answer": "\\udc00"}', "column 'answer' holds half a character (\\udc00)"),
        ('{"prompt": "?", "answer": "2", "trace": "\\ud800"}', "column 'traces' holds half a character"),
        ('{"prompt": "?", "answer": "2", "id": "\\ud800"}', "column 'id' holds half a character"),
        ('{"prompt": "?", "answer": ["\\ud800"]}', "column 'answer' must be a text or a number; got a list"),
        ('{"prompt": ' + "[" * 100_000, "nested too deep"),
        ({**GOOD, "id": True}, "column 'id' must be a text that is not empty; got true or false True"),
        ({**GOOD, "traces": [3]}, "column 'traces' must hold texts or chat messages; got int 3"),
    ],
)
def test_a_bad_row_is_one_line_with_file_line_column_and_what_was_got(tmp_path, row, message):
    path = jsonl(tmp_path / "toy.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        load_problems(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_row_of_a_parquet_file_is_named_by_its_number(tmp_path):
    path = parquet(tmp_path / "toy.parquet", GOOD, {"prompt": "?", "answer": None})
    with pytest.raises(DataError, match=r"toy.parquet:row 2: column 'answer' is missing"):
        load_problems(path)


def test_a_damaged_page_of_a_parquet_file_is_one_line(tmp_path):
    path = parquet(tmp_path / "toy.parquet", *({"prompt": f"{i}?" * 20, "answer": "2"} for i in range(500)))
    raw = bytearray(path.read_bytes())
    raw[200:400] = bytes(200)
    path.write_bytes(raw)
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(DataError, match=r"toy.parquet: damaged after row \d+: ") as caught:
            load_problems(path, on_bad_row=on_bad_row)
        assert "\n" not in str(caught.value)


def test_bad_rows_can_be_skipped_and_are_reported(tmp_path, caplog):
    path = jsonl(tmp_path / "toy.jsonl", "nonsense", GOOD, {"prompt": "?"}, GOOD)
    assert len(load_problems(path, on_bad_row="skip")) == 2
    assert "skipped 2 bad rows of 4" in caplog.text
    assert f"{path}:1: not JSON" in caplog.text


def test_a_file_of_bad_rows_only_is_an_error_even_when_skipping(tmp_path):
    path = jsonl(tmp_path / "toy.jsonl", "nonsense", "more")
    with pytest.raises(DataError, match="all 2 rows are bad, the first one being"):
        load_problems(path, on_bad_row="skip")


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_an_unknown_layout_names_the_columns_found_and_those_accepted(tmp_path, on_bad_row):
    path = jsonl(tmp_path / "toy.jsonl", {"text": "?", "label": "2"})
    with pytest.raises(DataError) as caught:
        load_problems(path, on_bad_row=on_bad_row)
    assert str(caught.value) == (
        f"{path}: unknown layout; columns found: label, text; "
        "accepted: prompt + reward_model or prompt + completion or question + answer or prompt + answer or messages or "
        "problem + answer; others by data.columns={prompt: ..., answer: ...}"
    )


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"toy.jsonl: no problems in it"):
        load_problems(jsonl(tmp_path / "toy.jsonl", "", ""))


def test_a_missing_file_an_unknown_type_and_a_broken_parquet_say_so(tmp_path):
    with pytest.raises(DataError, match=r"no.jsonl: no such file"):
        load_problems(tmp_path / "no.jsonl")
    with pytest.raises(
        DataError, match=r"toy.tsv: unknown file type '.tsv'; accepted: .jsonl, .json, .csv, .parquet, task://"
    ):
        load_problems(tmp_path / "toy.tsv")
    (tmp_path / "toy.parquet").write_text("no")
    with pytest.raises(DataError, match=r"toy.parquet: not a parquet file"):
        load_problems(tmp_path / "toy.parquet")


def test_columns_of_other_names_are_taken_for_ours(tmp_path):
    rows = [
        {"question": "1 + 1?", "solution": "2", "answer": "the answer is two", "proof": ["one and one"], "n": 7},
        {"question": "1 + 2?", "solution": 3, "answer": "no GSM8K", "n": 8},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"prompt": "question", "answer": "solution", "traces": "proof", "id": "n"}
    first, second = load_problems(path, columns=names)
    assert (first.prompt[0]["content"], first.answer, first.traces, first.id) == ("1 + 1?", "2", ("one and one",), "7")
    assert (second.answer, second.traces, second.id) == ("3", (), "8")


def test_a_column_that_is_not_there_is_named_with_the_key(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1 + 1?", "solution": "2"}\n')
    with pytest.raises(
        DataError, match=r"column 'text' is missing \(data\.columns: prompt\); columns found: question, "
    ):
        load_problems(path, columns={"prompt": "text", "answer": "solution"})


@pytest.mark.parametrize("given", ["data.columns={prompt: question, answer: solution}", "data.columns.prompt=question"])
def test_columns_are_a_key_of_the_configuration(given):
    assert merge_config({}, [given]).data.columns["prompt"] == "question"
    with pytest.raises(TrapoError, match=r"data\.columns: got \['question'\]; names must be among prompt, answer"):
        merge_config({}, ["data.columns={question: prompt}"])
