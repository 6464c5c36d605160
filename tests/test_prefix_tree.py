"""Sequences that begin alike become a tree in which each token sees its own sequence and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trapo.models.prefix_tree import Costs, grow, plant, shared_beginning, size

FREE = Costs(pair=0.0)  # attention costs nothing: whatever begins alike is shared

ids = st.lists(st.integers(0, 2), min_size=1, max_size=7)
many = st.lists(ids, min_size=1, max_size=8)


def trees_of(sequences, budget=1000, costs=FREE):
    return [[sequences[i] for i in tree] for tree in grow(sequences, budget, costs)]


@given(many)
def test_each_token_sees_exactly_its_own_sequence_up_to_itself(sequences):
    order = [i for tree in grow(sequences, 1000, FREE) for i in tree]
    forest = plant(trees_of(sequences), pad_id=9)
    width = forest.input_ids.shape[1]
    places = forest.places.split([len(sequences[i]) for i in order])
    for i, place in zip(order, places, strict=True):
        row, columns = int(place[0]) // width, place % width
        assert (place // width == row).all()
        assert forest.input_ids[row, columns].tolist() == sequences[i]
        assert forest.position_ids[row, columns].tolist() == list(range(len(sequences[i])))
        for t, column in enumerate(columns.tolist()):
            seen = forest.sight[row, 0, column].nonzero()[:, 0]
            assert sorted(seen.tolist()) == sorted(columns[: t + 1].tolist())


@given(many)
def test_a_tree_holds_each_beginning_once(sequences):
    for tree in trees_of(sequences):
        beginnings = {tuple(s[: t + 1]) for s in tree for t in range(len(s))}
        assert size(tree) == len(beginnings)
        forest = plant([tree], pad_id=9)
        assert forest.input_ids.shape[1] == len(beginnings)


@given(many, st.integers(1, 20), st.sampled_from([0.0, 0.01, 0.3]))
def test_every_sequence_is_in_one_tree_within_the_budget(sequences, budget, pair):
    trees = grow(sequences, budget, Costs(pair))
    assert sorted(i for tree in trees for i in tree) == list(range(len(sequences)))
    for tree in trees:
        assert len(tree) == 1 or size([sequences[i] for i in tree]) <= budget


def test_padding_sees_itself_alone_and_nobody_sees_it():
    forest = plant([[[1, 2, 3], [1, 2, 4]], [[5]]], pad_id=9)
    assert forest.input_ids.tolist() == [[1, 2, 3, 4], [5, 9, 9, 9]]
    assert forest.sight[1, 0].tolist() == torch.eye(4, dtype=torch.bool).tolist()


def test_a_sequence_stays_alone_where_the_trees_square_costs_more_than_it_saves():
    shared, tail = list(range(10)), list(range(100, 500))
    sequences = [[*shared, k, *tail] for k in range(4)]
    assert len(grow(sequences, 10_000, FREE)) == 1
    assert len(grow(sequences, 10_000, Costs(pair=0.01))) == 4
    prompt = list(range(400))
    sequences = [[*prompt, 1000 + k] for k in range(4)]
    assert len(grow(sequences, 10_000, Costs(pair=0.001))) == 1


@pytest.mark.parametrize(
    ("first", "second", "count"), [([], [1], 0), ([1], [1], 1), ([1, 2], [1, 3], 1), ([2], [1], 0)]
)
def test_shared_beginning(first, second, count):
    assert shared_beginning(first, second) == shared_beginning(second, first) == count
