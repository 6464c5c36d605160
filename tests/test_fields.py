"""What presets say of themselves: their signatures, and what is meant by a field that there is not."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import pytest
import torch

import trapo_kernels as tk
from trapo_kernels import batch
from trapo_kernels.arguments.fields import WORDS, Overrides
from trapo_kernels.objective import FIELDS
from trapo_kernels.presets import Presets

PRESETS = [name for name, value in vars(Presets).items() if isinstance(value, classmethod) and name[0] != "_"]


def test_an_editor_knows_the_fields_that_there_are():
    assert set(Overrides.__annotations__) == set(FIELDS)
    assert len(PRESETS) >= 15


@pytest.mark.parametrize("name", PRESETS)
def test_the_signature_of_a_preset_has_every_field_with_its_own_value(name):
    preset = getattr(tk.Objective, name)
    parameters = inspect.signature(preset).parameters
    assert [p for p in parameters if p in FIELDS] == list(FIELDS)
    made = preset()
    assert {field: parameters[field].default for field in FIELDS} == {field: getattr(made, field) for field in FIELDS}
    # Its defaults, given, change nothing.
    assert preset(**{field: parameters[field].default for field in FIELDS}) == made


@pytest.mark.parametrize(
    ("field", "meant"),
    [("beta", "kl_coef"), ("epsilon", "clip_low"), ("epsilon_high", "clip_high"), ("loss_agg_mode", "reduction"),
     ("clip_ratio_c", "dual_clip"), ("entropy_coeff", "entropy_coef"), ("clip_hihg", "clip_high")],
)  # fmt: skip
@pytest.mark.parametrize("preset", ["grpo", "dapo", "trapo", "chord", "gspo"])
def test_an_unknown_field_is_answered_with_the_one_that_was_meant(preset, field, meant):
    with pytest.raises(TypeError, match=rf"^Objective: unknown field '{field}'; did you mean {meant}"):
        getattr(tk.Objective, preset)(**{field: 0.1})


def test_the_class_itself_answers_as_its_presets_do():
    for make in (tk.Objective, lambda **fields: replace(tk.Objective.grpo(), **fields)):
        with pytest.raises(TypeError, match=r"^Objective: unknown field 'epsilon_high'; did you mean clip_high\?$"):
            make(epsilon_high=0.1)
    assert [*inspect.signature(tk.Objective).parameters] == [*FIELDS]


def test_a_word_that_means_nothing_gets_no_hint():
    with pytest.raises(TypeError, match=r"^Objective: unknown field 'xyzzy'$"):
        tk.Objective.grpo(xyzzy=1)


def test_words_of_others_are_no_fields_and_lead_to_some():
    assert not set(WORDS) & set(FIELDS)
    places = {meant.split()[0].rstrip(",") for meant in WORDS.values()}
    assert places - set(FIELDS) == {"temperature", "ignore_index", "advantages", "normalizer"}


def test_a_mixed_loss_without_an_expert_mask_says_so_once():
    given = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    ones = torch.ones(2)
    batch._say_no_expert.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for objective in (tk.Objective.grpo(), tk.Objective.sft(), tk.Objective.trapo(expert_coef=0)):
            tk.linear_policy_loss(*given, objective, advantages=ones)
        tk.linear_policy_loss(*given, tk.Objective.trapo(), advantages=ones, expert_mask=torch.tensor([True, False]))
        assert not [w for w in said if "expert_mask" in str(w.message)]
        for _ in range(2):
            tk.linear_policy_loss(*given, tk.Objective.trapo(), advantages=ones)
    found = [str(w.message) for w in said if "expert_mask" in str(w.message)]
    assert found == [
        "linear_policy_loss: objective has an expert term, and expert_mask is None: no token gets it "
        "(an objective with expert=None says the same without this line)"
    ]
