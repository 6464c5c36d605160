import random

import pytest

from trapo.data import Problem
from trapo.encode import encode_problems
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
