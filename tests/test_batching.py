import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trapo.batching import collate, loss_tokens, micro_batches
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.rollouts import Rollout

PROBLEM = EncodedProblem(Problem("p", ({"role": "user", "content": "?"},), "1", (), "test"), (5, 6, 7), ())


def rollout(prefix=(), own=(), supervised=True, advantage=0.5):
    return Rollout(
        PROBLEM, 0, 0, 0.5 if prefix else 0.0, tuple(prefix), tuple(own), supervised, True, 1.0, "ok", advantage
    )


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_every_index_once_and_keep_to_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget


def test_equal_lengths_fill_the_budget():
    assert [len(g) for g in micro_batches([10] * 7, 30)] == [3, 3, 1]


def test_targets_are_the_next_tokens_and_masks_mark_prefix_and_own_tokens():
    batch = collate([rollout(prefix=(10, 11), own=(20, 21)), rollout(own=(30,))], pad_id=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 11, 20], [5, 6, 7, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 10, 11, 20, 21], [6, 7, 30, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, False, True, True, True, True], [False, False, True, False, False, False]]
    assert batch.expert_mask.tolist() == [[False, False, True, True, False, False], [False] * 6]
    assert batch.advantages.tolist() == [0.5, 0.5]


def test_an_unsupervised_prefix_is_context_but_not_in_the_loss():
    batch = collate([rollout(prefix=(10, 11), own=(20,), supervised=False)], pad_id=0, device=torch.device("cpu"))
    assert batch.mask.tolist() == [[False, False, False, False, True]]


@pytest.mark.parametrize(
    ("r", "count"),
    [
        (rollout(prefix=(1, 2), own=(3,)), 3),
        (rollout(prefix=(1, 2), own=(3,), supervised=False), 1),
        (rollout(own=(3, 4), supervised=False), 2),
    ],
)
def test_loss_tokens_counts_what_the_mask_marks(r, count):
    assert loss_tokens(r) == count
    assert int(collate([r], 0, torch.device("cpu")).mask.sum()) == count
