"""What a run says and does when rewards fail."""

import pytest

from trapo.config import merge_config
from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.rewards import Reward
from trapo.rewards.scoring import FailureNotes, score_texts

OK, ERROR, LATE = Reward(1.0, "ok"), Reward(0.0, "error", "KeyError: 'api_key'"), Reward(0.0, "timeout", "no result")
PROBLEM = Problem("p1", ({"role": "user", "content": "2+2?"},), "4", (), "test")


@pytest.fixture
def notes():
    said = []
    notes = FailureNotes(said.append)
    notes.said = said
    return notes


def test_the_first_reason_of_each_kind_is_said_once(notes):
    notes.check([OK, ERROR, ERROR, LATE], "step 1")
    notes.check([ERROR, OK, LATE], "step 2")
    assert len(notes.said) == 2
    assert "step 1" in notes.said[0]
    assert "error: KeyError: 'api_key'" in notes.said[0]
    assert "timeout: no result" in notes.said[1]


def test_a_first_step_whose_rewards_all_fail_ends_the_run_with_its_reason(notes):
    with pytest.raises(
        TrapoError, match=r"all 3 rewards of step 1 failed \(2 x error, 1 x timeout\); the first: KeyError"
    ):
        notes.check([ERROR, ERROR, LATE], "step 1")


def test_a_later_one_is_a_warning(notes):
    notes.check([OK], "step 1")
    notes.check([ERROR, ERROR], "step 2")
    assert any(line.startswith("WARNING: reward.function: all 2 rewards of step 2 failed") for line in notes.said)


@pytest.mark.parametrize("value", [5.0, -1.0, 1.0001])
def test_a_reward_that_is_no_share_of_one_ends_the_run_and_says_how_to_declare_it(notes, value):
    with pytest.raises(TrapoError) as caught:
        notes.check([OK, ERROR, Reward(value, "ok")], "step 7")
    message = str(caught.value)
    assert message.startswith(f"reward.function: got a reward of {value:g} in step 7; accepted: 0 to 1")
    assert "reward.range=[LOW,HIGH]" in message
    assert "\n" not in message


def test_a_sum_that_passes_one_by_its_rounding_is_a_share(notes):
    notes.check([Reward(1.0000001, "ok"), Reward(-1e-8, "ok")], "step 1")
    assert notes.said == []


class Pool:
    def __init__(self, wants_row):
        self.wants_row, self.asked = wants_row, None

    def score(self, items):
        self.asked = list(items)
        return [OK] * len(self.asked)


def test_a_function_is_given_the_other_columns_only_where_it_asks_for_them():
    plain, curious = Pool(False), Pool(True)
    assert score_texts(plain, ["4"], [PROBLEM]) == score_texts(curious, ["4"], [PROBLEM]) == [OK]
    assert plain.asked == [("4", "4")]
    assert curious.asked == [
        ("4", "4", {"prompt": [{"role": "user", "content": "2+2?"}], "id": "p1", "source": "test"})
    ]


@pytest.mark.parametrize("bounds", ["[1,0]", "[0]", "[0,1,2]", "[0,.inf]", "[0,0]"])
def test_an_impossible_range_is_refused(bounds):
    with pytest.raises(TrapoError, match=r"reward\.range: got .*; must be two finite numbers, the lower one first"):
        merge_config({}, [f"reward.range={bounds}"])
