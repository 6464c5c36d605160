"""Problems are loaded here: prompts with their answers and expert traces, from files or from a generator.

    load_problems("train.jsonl")                                        # our own layout, or GSM8K's
    load_problems("aime.parquet", dedup=True)                           # verl's layout
    load_problems("task://word_problems?split=train&n=2000&seed=1")     # generated, nothing to download

The layout follows from the columns, whatever the file type:

    ours    prompt (text or chat), answer, and optionally traces (list) or trace (text), id, source
    chat    messages (the assistant's last one is the expert trace), and optionally answer; else that is the answer
    TRL     prompt, completion (the expert trace), and optionally answer; else the completion is the answer
    GSM8K   question, answer (a worked solution ending in "#### n")
    MATH    problem, answer, and optionally solution (the expert trace)
    verl    prompt (chat), reward_model.ground_truth, and optionally data_source and expert traces: target, target_2 or
            traces in the row or in its extra_info, and any other target_... that holds a chat

    load_problems("train.jsonl", columns={"prompt": "question", "answer": "solution"})      # ours under other names
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from trapo.data.files import READERS, Row, kind_of
from trapo.data.problem import COLUMNS, DataError, Message, Problem, digest
from trapo.rewards import ANSWER_MARK, FINAL_ANSWER

log = logging.getLogger(__name__)


def load_problems(
    path: str | Path,
    *,
    system_prompt: str | None = None,
    prompt_suffix: str = "",
    limit: int | None = None,
    dedup: bool = False,
    on_bad_row: Literal["raise", "skip"] = "raise",
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Problem]:
    """Reads a .jsonl, .json, .csv or .parquet file, or generates from a task:// address (see the module's docstring).

    system_prompt: takes the place of the prompts' own system message ("" removes it, None keeps it).
    prompt_suffix: appended to the last message. limit: the first so many problems. dedup: drops problems whose
    question and answer came before (AIME files repeat each 32 times). on_bad_row="skip" leaves bad rows out
    and logs how many. An id that different problems share is made unique by a digest of the problem.
    columns: names of our layout -> the columns of the file that hold them.

    Raises DataError for an unknown layout, a bad row, a missing file, or no problem at all.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"load_problems: on_bad_row must be 'raise' or 'skip'; got {on_bad_row!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"load_problems: limit must be at least 1; got {limit}")
    if str(path).startswith("task:"):
        found = iter(_generated(str(path)))
    else:
        found = _read(Path(path), columns, skip=on_bad_row == "skip")
    problems: list[Problem] = []
    contents: list[str] = []
    seen: set[str] = set()
    for problem in found:
        content = _content(problem.prompt, problem.answer)
        if not (dedup and content in seen):
            seen.add(content)
            problems.append(problem)
            contents.append(content)
        if len(problems) == limit:
            break
    if not problems:
        raise DataError(f"{path}: no problems in it")
    return [_with_prompt(p, system_prompt, prompt_suffix) for p in _told_apart(problems, contents)]


def _told_apart(problems: list[Problem], contents: list[str]) -> list[Problem]:
    """Returns the problems with ids that differ wherever their contents do: an id may be no more than a category in its
    file."""
    by_id: dict[str, set[str]] = {}
    for problem, content in zip(problems, contents, strict=True):
        by_id.setdefault(problem.id, set()).add(content)
    return [
        replace(problem, id=f"{problem.id}/{content}") if len(by_id[problem.id]) > 1 else problem
        for problem, content in zip(problems, contents, strict=True)
    ]


def _with_prompt(problem: Problem, system_prompt: str | None, suffix: str) -> Problem:
    messages = list(problem.prompt)
    if system_prompt is not None:
        messages = [m for m in messages if m["role"] != "system"]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
    messages[-1] = {**messages[-1], "content": messages[-1]["content"] + suffix}
    return replace(problem, prompt=tuple(messages))


# ----------------------------------------------------------------------------------------------- generated


def _generated(address: str) -> list[Problem]:
    """Returns the problems of a source task://NAME?split=train&n=2000&seed=1&..., the options being those of the task's
    `generate`."""
    from trapo.data.tasks import word_problems

    form = "task://word_problems?split=train&n=2000&seed=1&difficulty=mixed"
    parts = urlsplit(address)
    if parts.netloc != "word_problems" or parts.path not in ("", "/"):
        raise DataError(f"{address}: no such task; accepted: {form}")
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        split, n, seed = options.pop("split"), int(options.pop("n")), int(options.pop("seed", "0"))
        difficulty = options.pop("difficulty", word_problems.DEFAULT_DIFFICULTY)
        if options:
            raise DataError(f"{address}: unknown option {min(options)!r}; accepted: {form}")
        return word_problems.generate(split, n, seed=seed, difficulty=difficulty)
    except KeyError as error:
        raise DataError(f"{address}: option {error} is missing; accepted: {form}") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{address}: {error}; accepted: {form}") from None


# ------------------------------------------------------------------------------------------------- from files


def _read(path: Path, columns: Mapping[str, str], *, skip: bool) -> Iterator[Problem]:
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; accepted: {', '.join(READERS)}, task://...")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    parse: Callable[[Row, str], Problem] | None = _parse_own if columns else None
    bad: list[DataError] = []
    good = 0
    for where, row in READERS[path.suffix](path):
        try:
            if isinstance(row, DataError):
                raise row
            if parse is None:
                parse = _layout(row, path)
            renamed = _renamed(row, columns)
            problem = _writable(parse(renamed, path.stem))
            problem = replace(problem, row=_others(renamed), behaviour=_behaviour(renamed, len(problem.traces)))
        except _UnknownLayout:
            raise
        except DataError as error:
            bad.append(DataError(f"{path}:{where}: {error}"))
            if not skip:
                raise bad[-1] from None
            continue
        good += 1
        yield problem
    if bad:
        if not good:
            raise DataError(f"{path}: all {len(bad)} rows are bad, the first one being {bad[0]}")
        log.warning("%s: skipped %d bad rows of %d; the first: %s", path, len(bad), len(bad) + good, bad[0])


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns the row with the columns of our layout in place of those that hold them. Optional ones may be missing."""
    if not columns:
        return row
    for ours in ("prompt", "answer"):
        if (name := columns.get(ours, ours)) not in row:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise DataError(f"column {name!r} is missing (data.columns: {ours}); columns found: {found}")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[name] for ours, name in columns.items() if name in row}


def _others(row: Row) -> dict[str, Any]:
    """Returns the columns that are none of ours, for reward functions."""
    return {str(name): value for name, value in row.items() if name not in COLUMNS}


def _writable(problem: Problem) -> Problem:
    """Returns the problem, if UTF-8 can spell it: JSON may hold half of a surrogate pair, as a cut emoji leaves one."""
    texts = [("id", problem.id), ("source", problem.source), ("answer", problem.answer)]
    texts += [("prompt", m["role"] + m["content"]) for m in problem.prompt] + [
        ("traces", trace) for trace in problem.traces
    ]
    for column, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"column {column!r} holds half a character (\\u{ord(text[error.start]):04x})") from None
    return problem


class _UnknownLayout(DataError):
    pass


def _layout(row: Row, path: Path) -> Callable[[Row, str], Problem]:
    for columns, parse in _LAYOUTS.items():
        if all(c in row for c in columns):
            # A table may have both: a question, and the prompt that was made of it.
            plain = parse is _parse_gsm8k and "prompt" in row and ANSWER_MARK not in str(row["answer"])
            return _parse_own if plain else parse
    accepted = " or ".join(" + ".join(columns) for columns in _LAYOUTS)
    found = ", ".join(sorted(map(str, row))) or "none"
    raise _UnknownLayout(
        f"{path}: unknown layout; columns found: {found}; accepted: {accepted}; "
        "others by data.columns={prompt: ..., answer: ...}"
    )


def _parse_own(row: Row, source: str) -> Problem:
    messages = _messages(_column(row, "prompt"))
    answer = _answer(_column(row, "answer"), "answer")
    source = _optional_text(row, "source") or source
    known_id = _optional_id(row) or _content_id(source, messages, answer)
    traces = _traces(row.get("traces"), "traces")
    traces += tuple(t for t in _traces(row.get("trace"), "trace") if t not in traces)
    return Problem(known_id, messages, answer, traces, source)


def _parse_completion(row: Row, source: str) -> Problem:
    traces = _traces(_column(row, "completion"), "completion")
    if not traces:
        raise DataError(
            f"column 'completion' must be a text or an assistant's messages; got {kind_of(row['completion'])}"
        )
    answer = traces[-1] if row.get("answer") is None else row["answer"]
    return _parse_own({**row, "traces": list(traces), "answer": answer}, source)


def _parse_chat(row: Row, source: str) -> Problem:
    chat = _column(row, "messages")
    if not _holds_chat(chat) or not isinstance(chat, list) or isinstance(chat[0], list):
        raise DataError(f"column 'messages' must be a list of {{role, content}}; got {kind_of(chat)}")
    if chat[-1]["role"] != "assistant":
        return _parse_own({**row, "prompt": chat}, source)
    return _parse_completion({**row, "prompt": chat[:-1], "completion": chat[-1]["content"]}, source)


def _parse_math(row: Row, source: str) -> Problem:
    return _parse_own({**row, "prompt": _column(row, "problem"), "trace": row.get("solution")}, source)


def _parse_gsm8k(row: Row, _: str) -> Problem:
    question, solution = _text(_column(row, "question"), "question"), _text(_column(row, "answer"), "answer")
    steps, mark, answer = solution.rpartition(ANSWER_MARK)
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise DataError(
            f"column 'answer' must end in '{ANSWER_MARK} n'; got {solution[-40:]!r} "
            "(an answer without its solution goes with a column 'prompt' instead of 'question', or with "
            "data.columns={prompt: question})"
        )
    # <<48/2=24>> are marks for a calculator, which the reader of a solution never sees.
    steps = re.sub(r"<<.*?>>", "", steps).strip()
    trace = f"{steps}\n{FINAL_ANSWER.format(answer=answer)}".lstrip("\n")
    messages = _messages(question)
    return Problem(_content_id("gsm8k", messages, answer), messages, answer, (trace,), "gsm8k")


def _parse_verl(row: Row, source: str) -> Problem:
    messages = _messages(_column(row, "prompt"))
    model = _column(row, "reward_model")
    if not isinstance(model, Mapping) or model.get("ground_truth") is None:
        raise DataError("column 'reward_model' must be a record with a ground_truth; got " + kind_of(model))
    answer = _answer(model["ground_truth"], "reward_model.ground_truth")
    extra = row.get("extra_info")
    traces: list[str] = []
    for record in (row, extra if isinstance(extra, Mapping) else {}):
        for column in sorted(str(k) for k in record):
            # target_lang, target_length and the like describe the row; only a chat under such a name is a trace.
            named = re.fullmatch(r"traces?|targets?([_-]?\d+)?", column)
            if named or (re.fullmatch(r"target[_-]\w+", column) and _holds_chat(record[column])):
                traces += _traces(record[column], column)
    source = _optional_text(row, "data_source") or source
    return Problem(_content_id(source, messages, answer), messages, answer, tuple(traces), source)


_LAYOUTS: dict[tuple[str, ...], Callable[[Row, str], Problem]] = {
    ("prompt", "reward_model"): _parse_verl,
    ("prompt", "completion"): _parse_completion,
    ("question", "answer"): _parse_gsm8k,
    ("prompt", "answer"): _parse_own,
    ("messages",): _parse_chat,
    ("problem", "answer"): _parse_math,
}


# ------------------------------------------------------------------------------------------------- one cell


def _column(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"column {name!r} is missing; columns found: {', '.join(sorted(map(str, row)))}")
    return row[name]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r} must be a text that is not empty; got {kind_of(value)}")
    return value


def _optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) is None else _text(row[column], column)


def _optional_id(row: Row) -> str:
    known_id = row.get("id")
    if isinstance(known_id, int) and not isinstance(known_id, bool):  # many sets number their rows
        return str(known_id)
    return _optional_text(row, "id")


def _answer(value: Any, column: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"column {column!r} must be a text or a finite number; got {value}")
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r} must be a text or a number; got {kind_of(value)}")
    return value.strip()


def _messages(value: Any) -> tuple[Message, ...]:
    """Returns a prompt as chat messages: a text is one user message."""
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, "prompt")},)
    if not isinstance(value, list) or not value or not all(_is_message(m) for m in value):
        raise DataError(f"column 'prompt' must be a text or a list of {{role, content}}; got {kind_of(value)}")
    if value[-1]["role"] != "user":
        raise DataError(f"column 'prompt' must end with a user message; got role {value[-1]['role']!r}")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(k), str) for k in ("role", "content"))


def _holds_chat(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(_is_message(i) or (isinstance(i, list) and _holds_chat(i)) for i in items)


def _traces(value: Any, column: str) -> tuple[str, ...]:
    """Returns the expert traces: a text, a list of texts, a chat (its assistant's messages), or a list of chats."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    traces: list[str] = []
    for item in items:
        if isinstance(item, str):
            traces.append(item)
        elif _is_message(item):
            traces += [item["content"]] if item["role"] == "assistant" else []
        elif isinstance(item, list) and all(_is_message(m) for m in item):
            traces += [m["content"] for m in item if m["role"] == "assistant"]
        else:
            raise DataError(f"column {column!r} must hold texts or chat messages; got {kind_of(item)}")
    return tuple(t for t in traces if t.strip())


def _behaviour(row: Row, traces: int) -> tuple[tuple[float, ...], ...]:
    """Returns the log-probabilities of each trace's tokens: a list of numbers, or one of lists, a trace each."""
    value = row.get("behaviour_logprobs")
    if value is None:
        return ()
    lists = [value] if isinstance(value, list) and not any(isinstance(v, list) for v in value) else value
    if not isinstance(lists, list) or len(lists) != traces or not all(map(_are_logprobs, lists)):
        raise DataError(
            f"column 'behaviour_logprobs' must hold log-probabilities, a list for each of the {traces} traces; got "
            f"{kind_of(value)}"
        )
    return tuple(tuple(map(float, numbers)) for numbers in lists)


def _are_logprobs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and -math.inf < v <= 0 for v in value
    )


def _content_id(source: str, messages: tuple[Message, ...], answer: str) -> str:
    return f"{source}/{_content(messages, answer)}"


def _content(messages: tuple[Message, ...], answer: str) -> str:
    """Returns a digest of question and answer, whatever the system prompt."""
    return digest("\0".join(m["content"] for m in messages if m["role"] != "system"), answer)
