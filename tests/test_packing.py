"""A packed row computes what padded rows do, and its sequences do not see each other."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_batching import rollout
from test_learner import rollouts, same, updated
from transformers import AutoModelForCausalLM

import trapo_kernels as tk
from trapo.batching import collate, filler, pack, packs
from trapo.config import ModelConfig
from trapo.learner import is_packed
from trapo.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def hidden(model, batch):
    options = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    with torch.no_grad():
        states = model.get_decoder()(input_ids=batch.input_ids, use_cache=False, **options)
    return batch.rows(states.last_hidden_state)


def packed_and_padded(model):
    return zip(hidden(model, pack(rollouts(), CPU)), hidden(model, collate(rollouts(), 2, CPU)), strict=True)


def check_no_cross_talk(model):
    sample = rollouts()
    before = hidden(model, pack(sample, CPU))
    changed = dataclasses.replace(sample[3], own_ids=tuple(t + 1 for t in sample[3].own_ids))
    after = hidden(model, pack([*sample[:3], changed, *sample[4:]], CPU))
    assert not torch.equal(before[3], after[3])
    assert all(before[i].equal(after[i]) for i in range(len(sample)) if i != 3)


def test_every_token_of_a_packed_row_gets_the_hidden_state_of_a_padded_one(model):
    for packed, padded in packed_and_padded(model):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)


def test_changing_one_sequence_leaves_the_others_of_its_row_bit_for_bit(model):
    check_no_cross_talk(model)


@pytest.mark.slow
def test_smollm2_packs_too():
    """Its hidden states reach 50, where neighbouring float32 numbers are 4e-6 apart: 1e-5 is of the largest."""
    model, _ = load_model(ModelConfig())
    for packed, padded in packed_and_padded(model):
        torch.testing.assert_close(packed, padded, atol=1e-5 * float(padded.abs().max()), rtol=0)
    check_no_cross_talk(model)
    for packed, padded in packed_and_padded(model.double()):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "objective",
    [tk.Objective.trapo(entropy_coef=0.01), tk.Objective.gspo(expert="trsft")],
    ids=["token by token", "by sequence"],
)
def test_packing_does_not_change_the_update(model, objective):
    packed, report = updated(model, "train.packing=always", "optim.eps=1e-3", objective=objective)
    padded, expected = updated(model, "train.packing=never", "optim.eps=1e-3", objective=objective)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    assert same(packed, padded, 1e-6)


def test_old_logprobs_find_their_tokens_in_a_packed_row(model):
    options = ("train.updates_per_step=2", "optim.eps=1e-3", "optim.lr=0.01")
    packed, _ = updated(model, "train.packing=always", *options, objective=tk.Objective.grpo())
    padded, _ = updated(model, "train.packing=never", *options, objective=tk.Objective.grpo())
    assert same(packed, padded, 1e-5)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_packs_hold_every_index_once_and_count_real_tokens(lengths, budget):
    groups = packs(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
    # First fit: no two groups fit into one.
    totals = [sum(lengths[i] for i in group) for group in groups]
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])


def test_a_packed_row_is_the_sequences_end_to_end():
    batch = pack([rollout(prefix=(10, 11), own=(20, 21), advantage=0.5), rollout(own=(30,), advantage=-1.0)], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 11, 20, 5, 6, 7]]
    assert batch.targets.tolist() == [[6, 7, 10, 11, 20, 21, 6, 7, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch.sequence_ids.tolist() == [[0] * 6 + [1] * 3]
    assert batch.mask.tolist() == [[False, False, True, True, True, True, False, False, True]]
    assert batch.expert_mask.tolist() == [[False, False, True, True, False, False, False, False, False]]
    assert batch.advantages.tolist() == [[0.5] * 6 + [-1.0] * 3]


def test_values_of_rollouts_survive_the_way_into_a_batch_and_back():
    sample = [rollout(prefix=(10, 11), own=(20, 21)), rollout(own=(30,))]
    for batch in (pack(sample, CPU), collate(sample, 0, CPU)):
        rows = [torch.arange(6.0), torch.arange(3.0) + 9]
        assert [r.tolist() for r in batch.rows(batch.spread(rows))] == [r.tolist() for r in rows]
        assert [r.tolist() for r in batch.rows(batch.spread([None, rows[1]]))] == [[0.0] * 6, rows[1].tolist()]


def test_a_filler_is_in_no_loss():
    assert not filler(0, CPU).mask.any()


def test_auto_packs_where_attention_is_varlen(model):
    assert not is_packed(model, "auto")
    model.config._attn_implementation, before = "flash_attention_2", model.config._attn_implementation
    try:
        assert is_packed(model, "auto")
        assert not is_packed(model, "never")
    finally:
        model.config._attn_implementation = before
