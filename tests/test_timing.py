"""Time by part of a step."""

import time

import pytest

from trapo.tools.timing import StepTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_nested_parts_take_their_time_out_of_the_part_around_them(clock):
    timer = StepTimer()
    with timer.part("update"):
        clock(2)
        with timer.part("logprobs"):
            clock(3)
        clock(4)
    clock(50)  # outside
    with timer.part("generate"):
        clock(1)
    assert timer.take() == {
        "seconds_generate": 1,
        "seconds_reward": 0,
        "seconds_logprobs": 3,
        "seconds_update": 6,
    }


def test_time_up_to_an_exception_counts_and_taking_starts_anew(clock):
    timer = StepTimer()

    def fail():
        with timer.part("reward"):
            clock(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.take()["seconds_reward"] == 2
    assert timer.take()["seconds_reward"] == 0
