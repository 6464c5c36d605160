"""Drawing rollouts, with an engine that answers from a script: what is tested is who gets which prefix and when."""

import pytest

from trapo.data.encode import EncodedProblem, Trace
from trapo.data.problem import Problem
from trapo.engines.protocol import Completion
from trapo.guidance import ALWAYS, NEVER, PAPER, schedule
from trapo.rewards import Reward
from trapo.rollouts import collect

EOS = 2
TRACE = Trace((*range(100, 109), EOS), ())


def problem(name, traces=(TRACE,)):
    text = Problem(name, ({"role": "user", "content": name},), "1", (), "test")
    return EncodedProblem(text, tuple(ord(c) for c in name), tuple(traces))


class ScriptedEngine:
    """Continues every context with one token; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def generate(self, requests, *, temperature, seed):
        self.calls.append(list(requests))
        return [Completion((7, EOS), True) for _ in requests]

    def sync(self, model):
        pass


def right_if(test):
    return lambda rollouts: [Reward(float(test(r)), "ok") for r in rollouts]


def draw(problems, plan, score, **options):
    engine = ScriptedEngine()
    options = {"temperature": 1.0, "max_response_tokens": 50, "seed": 0, **options}
    return collect(problems, plan, engine, score, **options), engine


def test_prompts_that_fail_are_guided_more_and_more_and_prompts_that_succeed_are_not():
    rollouts, _ = draw([problem("easy"), problem("hard")], PAPER, right_if(lambda r: r.problem.problem.id == "easy"))
    easy, hard = rollouts[:8], rollouts[8:]
    assert [r.ratio for r in easy] == [0.0] * 8
    assert [r.ratio for r in hard] == [0.0] * 4 + [0.2] * 2 + [0.5] + [1.0]
    assert [len(r.prefix_ids) for r in hard] == [0] * 4 + [2] * 2 + [5] + [10]


def test_guidance_stops_once_it_has_helped_enough():
    # 4 wrong, then both guided ones right: the mean is 2/6 < 0.7, so the next is guided; 3/7 < 0.9 likewise.
    rollouts, _ = draw([problem("p")], PAPER, right_if(lambda r: r.guided))
    assert [r.guided for r in rollouts] == [False] * 4 + [True] * 4
    # 3 of 4 right at once: 0.75 is not below 0.5 or 0.7, but below the last threshold, 0.9.
    scores = iter([1, 1, 1, 0, 1, 1, 1, 1])
    rollouts, _ = draw([problem("p")], PAPER, right_if(lambda r: next(scores)))
    assert [r.ratio for r in rollouts] == [0.0] * 7 + [1.0]


def test_a_full_trace_generates_nothing_and_is_scored():
    rollouts, engine = draw([problem("p")], schedule([1], [1.0], [ALWAYS]), right_if(lambda r: True))
    assert engine.calls == []
    assert rollouts[0].own_ids == ()
    assert rollouts[0].finished
    assert rollouts[0].reward == 1.0


def test_all_prompts_of_a_micro_group_are_generated_in_one_call():
    _, engine = draw(
        [problem("a"), problem("b")], schedule([2, 1], [0.0, 0.5], [NEVER, ALWAYS]), right_if(lambda r: False)
    )
    assert [len(call) for call in engine.calls] == [4, 2]
    assert engine.calls[1][0].context == (ord("a"), *TRACE.token_ids[:5])


def test_prefix_and_own_tokens_share_the_response_limit():
    _, engine = draw([problem("p")], schedule([1], [0.5], [ALWAYS]), right_if(lambda r: True), max_response_tokens=8)
    assert engine.calls[0][0].max_new_tokens == 3


def test_a_whole_trace_that_no_response_can_hold_is_not_given():
    length = len(problem("p").traces[0].token_ids)
    for limit, given in ((length, length), (length - 1, 0)):
        rollouts, _ = draw(
            [problem("p")], schedule([1], [1.0], [ALWAYS]), right_if(lambda r: True), max_response_tokens=limit
        )
        assert [len(r.prefix_ids) for r in rollouts] == [given]
        assert rollouts[0].guided == bool(given)


@pytest.mark.parametrize("limit", [4, 5])
def test_a_prefix_that_fills_the_limit_is_cut_to_it_and_not_continued(limit):
    rollouts, engine = draw(
        [problem("p")], schedule([1], [0.5], [ALWAYS]), right_if(lambda r: True), max_response_tokens=limit
    )
    assert engine.calls == []
    assert len(rollouts[0].prefix_ids) == limit
    assert not rollouts[0].finished


def test_a_problem_without_traces_is_never_guided():
    rollouts, _ = draw([problem("p", traces=())], PAPER, right_if(lambda r: False))
    assert not any(r.guided or r.supervised for r in rollouts)


def test_one_per_prefix_supervises_the_first_of_each_micro_group():
    import dataclasses

    plan = dataclasses.replace(PAPER, supervise="one_per_prefix")
    rollouts, _ = draw([problem("p")], plan, right_if(lambda r: False))
    assert [r.supervised for r in rollouts[4:]] == [True, False, True, True]


def test_stop_decided_draws_no_more_of_a_prompt_that_is_always_right_and_all_of_the_others():
    import dataclasses

    plan = dataclasses.replace(PAPER, stop_decided=True)
    rollouts, engine = draw(
        [problem("easy"), problem("hard")], plan, right_if(lambda r: r.problem.problem.id == "easy")
    )
    assert [r.problem.problem.id for r in rollouts] == ["easy"] * 4 + ["hard"] * 8
    assert [len(call) for call in engine.calls] == [8, 2, 1]  # the last micro-group is a full trace
    without, _ = draw([problem("easy"), problem("hard")], PAPER, right_if(lambda r: r.problem.problem.id == "easy"))
    assert len(without) == 16


def test_stop_decided_goes_on_with_a_prompt_that_failed_once():
    import dataclasses

    plan = dataclasses.replace(PAPER, stop_decided=True)
    scores = iter([1, 1, 1, 0, 1, 1, 1, 1])
    rollouts, _ = draw([problem("p")], plan, right_if(lambda r: next(scores)))
    assert len(rollouts) == 8


def test_nothing_is_decided_without_rewards():
    import dataclasses

    plan = dataclasses.replace(PAPER, stop_decided=True)
    rollouts, _ = draw([problem("p")], plan, None)
    assert len(rollouts) == 8


def test_the_engines_logprobs_stay_with_the_rollouts():
    class WithLogprobs(ScriptedEngine):
        def generate(self, requests, *, temperature, seed):
            return [Completion((7, EOS), True, (-0.5, -0.25)) for _ in requests]

    options = {"temperature": 1.0, "max_response_tokens": 50, "seed": 0}
    plan = schedule([1, 1], [0.0, 1.0], [NEVER, ALWAYS])
    rollouts = collect([problem("p")], plan, WithLogprobs(), right_if(lambda r: False), **options)
    assert [r.rollout_logprobs for r in rollouts] == [(-0.5, -0.25), None]
