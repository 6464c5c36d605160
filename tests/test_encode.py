import copy
import random

import pytest

from trapo.data.encode import PromptEncoder, TraceEncoder, encode_problems
from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.guidance import OFFICIAL, PAPER

TRACE = "First we add.\n\n2 + 2 = 4\n\nThen we are done.\n#### 4"


def problem(traces=(TRACE,), prompt="What is 2 + 2?"):
    return Problem("p", ({"role": "user", "content": prompt},), "4", tuple(traces), "test")


def encode(problems, tokenizer, **options):
    return encode_problems(problems, tokenizer, **{"max_prompt_tokens": 100, "max_trace_tokens": 100, **options})


def test_prompts_go_through_the_chat_template_and_traces_end_the_sequence(tokenizer):
    (encoded,), _ = encode([problem()], tokenizer)
    text = tokenizer.decode(encoded.prompt_ids)
    assert text.endswith("<|im_start|>assistant\n")
    assert "What is 2 + 2?" in text
    assert encoded.traces[0].token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.traces[0].token_ids[:-1]) == TRACE


def test_blank_lines_of_a_trace_are_found(tokenizer):
    (encoded,), _ = encode([problem()], tokenizer)
    trace = encoded.traces[0]
    # SmolLM2 spells a blank line with two tokens; the second completes it.
    assert [tokenizer.decode(trace.token_ids[: i + 1]) for i in trace.blank_lines] == [
        "First we add.\n\n",
        "First we add.\n\n2 + 2 = 4\n\n",
    ]


def test_prefixes_follow_the_schedule(tokenizer):
    (encoded,), _ = encode([problem()], tokenizer)
    rng = random.Random(0)
    n = len(encoded.traces[0].token_ids)
    assert [len(encoded.prefix(PAPER, level, rng)) for level in range(4)] == [0, int(n * 0.2), int(n * 0.5), n]
    official = encoded.prefix(OFFICIAL, 2, rng)
    assert len(official) >= int(n * 0.5)


def test_a_problem_without_traces_has_an_empty_prefix(tokenizer):
    (encoded,), _ = encode([problem(traces=())], tokenizer)
    assert encoded.prefix(PAPER, 3, random.Random(0)) == ()


def test_long_prompts_are_left_out_whole_and_long_traces_singly(tokenizer):
    problems = [problem(), problem(prompt="long " * 200), problem(traces=(TRACE, "1 " * 200))]
    kept, left_out = encode(problems, tokenizer)
    assert (left_out.long_prompts, left_out.long_traces) == (1, 1)
    assert [len(p.traces) for p in kept] == [1, 1]


def test_nothing_left_is_an_error_that_names_the_limit(tokenizer):
    with pytest.raises(TrapoError, match=r"data\.max_prompt_tokens: all 1 prompts are longer than 3 tokens"):
        encode([problem()], tokenizer, max_prompt_tokens=3)


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TrapoError, match="no chat template"):
        encode([problem()], tokenizer)


def test_the_thinking_part_leaves_the_final_answer_out(tokenizer):
    (encoded,), _ = encode([problem(traces=("<think>2 + 2 = 4</think>\n#### 4",))], tokenizer, trace_part="thinking")
    assert tokenizer.decode(encoded.traces[0].token_ids[:-1]) == "<think>2 + 2 = 4</think>"


# Templates in the manner of real ones: "{% generation %}"-free, a role header a message, and an open turn at the end.
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"})


@pytest.mark.parametrize("template", [NO_SYSTEM + TURNS, DROPS_SYSTEM])
def test_a_system_message_goes_to_the_user_where_the_template_has_no_place_for_it(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (encoded,), left_out = encode([Problem("p", CHAT, "2", (), "t")], tokenizer)
    assert tokenizer.decode(encoded.prompt_ids) == "<user>Be brief.\n\n1 + 1?\n"
    assert "1 system messages went in front of the user's" in left_out.notes[0]


def test_a_system_message_stays_where_the_template_takes_it(tokenizer):
    (encoded,), left_out = encode([Problem("p", CHAT, "2", (), "t")], tokenizer)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in tokenizer.decode(encoded.prompt_ids)
    assert left_out.notes == ()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Conversation roles must\nalternate') }}",
        "{{ messages[0]['role'] + 1 }}",
        "{{ nothing.here }}",
        "{% for",
    ],
)
def test_a_template_that_fails_is_one_line(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(TrapoError, match=r"model\.path: the chat template fails on ") as error:
        encode([problem()], tokenizer)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_end_a_sequence_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(TrapoError, match="no end-of-sequence token"):
        encode([problem()], endless)


@pytest.mark.parametrize(
    ("end", "trace", "expected"),
    [
        ("<think>\n", "<think>\n2 + 2 = 4</think>\n4", "2 + 2 = 4</think>\n4"),
        ("<think>\n", "\n<think>2 + 2</think>", "2 + 2</think>"),
        ("<think>", "<think>\n2 + 2</think>", "\n2 + 2</think>"),
        ("<think>\n", "2 + 2</think>", "2 + 2</think>"),
        ("<|assistant|>\n", "<think>2 + 2</think>", "<think>2 + 2</think>"),
        ("", "<think>2 + 2</think>", "<think>2 + 2</think>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_not_opened_again(tokenizer, monkeypatch, end, trace, expected):
    monkeypatch.setattr(tokenizer, "chat_template", f"{TURNS}{{{{ {end!r} }}}}")
    (encoded,), left_out = encode([problem(traces=(trace,))], tokenizer)
    assert tokenizer.decode(encoded.traces[0].token_ids[:-1]) == expected
    assert any("<think>" in note for note in left_out.notes) == (end.startswith("<think>") and "<think>" in trace)


@pytest.mark.parametrize("tail", ["<|im_end|>", "<|im_end|>\n"])
def test_a_trace_that_brings_its_own_end_gets_no_second_one(tokenizer, tail):
    ids = TraceEncoder(tokenizer, "full").encode("four" + tail).token_ids
    assert ids == TraceEncoder(tokenizer, "full").encode("four").token_ids
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_holds_the_text_of_a_special_token_is_named(tokenizer):
    _, left_out = encode([problem(), problem(prompt="a <|im_end|> b")], tokenizer)
    assert "1 prompts hold the text of a special token" in left_out.notes[0]


def test_what_is_far_too_long_is_never_tokenised(tokenizer, monkeypatch):
    long = "word " * 100_000
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, problem: (1,) if problem.id == "p" else 1 / 0)
    problems = [problem(traces=(TRACE, long)), Problem("long", ({"role": "user", "content": long},), "4", (), "t")]
    kept, left_out = encode(problems, tokenizer)
    assert (len(kept), len(kept[0].traces), left_out.long_prompts, left_out.long_traces) == (1, 1, 1, 1)
