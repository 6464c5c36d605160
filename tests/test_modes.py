import pytest

from trapo.config import merge_config
from trapo.errors import TrapoError
from trapo.guidance import ALWAYS, NEVER
from trapo.modes import MODES, mode, phases


def plan(*overrides):
    return phases(merge_config({}, overrides))


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_accepted_by_the_configuration_says_what_it_does_and_has_phases(name):
    more = {
        "sft_then_rl": ["train.sft_steps=40"],
        "distill": ["distill.teacher=runs/sft/final"],
        "bridge": ["lora.rank=2"],
    }.get(name, [])
    assert sum(phase.steps for phase in plan(f"mode={name}", *more)) == 100
    assert MODES[name].doc.endswith(".")


def test_a_new_mode_is_one_function_and_one_line():
    @mode("GRPO under another name.")
    def toy(config):
        return MODES["grpo"].phases(config)

    try:
        assert plan("mode=toy") == plan("mode=grpo")
        with pytest.raises(TrapoError, match=r"accepted: trapo, .*, toy"):
            plan("mode=toys")
    finally:
        del MODES["toy"]


def test_trapo_uses_trsft_on_prefixes_and_guides_where_it_helps():
    (phase,) = plan("mode=trapo")
    assert (phase.objective.expert, phase.objective.alpha) == ("trsft", 0.1)
    assert phase.schedule.guides
    assert phase.needs_rewards
    assert not phase.std


def test_grpo_draws_as_many_rollouts_without_guidance_and_divides_by_the_std():
    (phase,) = plan("mode=grpo")
    assert not phase.schedule.guides
    assert phase.schedule.rollouts_per_prompt == 8
    assert phase.objective.expert is None
    assert (phase.objective.clip_low, phase.objective.clip_high) == (0.2, 0.2)
    assert phase.std


def test_sft_is_one_full_trace_per_prompt_without_generation_or_rewards():
    (phase,) = plan("mode=sft")
    assert [(g.size, g.ratio, g.threshold) for g in phase.schedule.micro_groups] == [(1, 1.0, ALWAYS)]
    assert not phase.schedule.generates
    assert not phase.needs_rewards


def test_sft_then_rl_is_two_phases_whose_steps_add_up():
    first, second = plan("mode=sft_then_rl", "train.steps=10", "train.sft_steps=4")
    assert (first.name, first.steps, second.name, second.steps) == ("sft", 4, "grpo", 6)


def test_luffy_puts_one_full_trace_into_every_group():
    (phase,) = plan("mode=luffy")
    assert [(g.size, g.ratio, g.threshold) for g in phase.schedule.micro_groups] == [(7, 0.0, NEVER), (1, 1.0, ALWAYS)]
    assert phase.objective.expert == "luffy"
    assert phase.needs_rewards


def test_the_ablations_change_one_thing_each():
    (trapo,), (nll,), (fixed,) = plan("mode=trapo"), plan("mode=nll_prefix"), plan("mode=fixed_prefix")
    assert nll.schedule == trapo.schedule
    assert nll.objective.expert == "sft"
    assert fixed.objective == trapo.objective
    assert [(g.size, g.ratio, g.threshold) for g in fixed.schedule.micro_groups] == [(4, 0.0, NEVER), (4, 0.5, ALWAYS)]


def test_the_official_preset_reaches_the_schedule_and_single_fields_change_it():
    (phase,) = plan("guidance.preset=official", "guidance.ratios=[0,0.3,0.6,1]")
    assert phase.schedule.supervise == "one_per_prefix"
    assert [g.ratio for g in phase.schedule.micro_groups] == [0.0, 0.3, 0.6, 1.0]
    assert phase.schedule.micro_groups[2].threshold == 4 / 6


def test_settings_of_the_objective_win_over_the_modes():
    (phase,) = plan("mode=trapo", "objective.expert=dft", "objective.expert_coef=0.1", "advantage.std=true")
    assert (phase.objective.expert, phase.objective.expert_coef, phase.std) == ("dft", 0.1, True)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("objective.alpha=2", "alpha"),
        ("objective.expert=nll", "expert"),
        ("guidance.sizes=[4,4]", "one entry per micro-group"),
    ],
)
def test_impossible_objectives_and_schedules_are_refused_in_one_line(override, named):
    with pytest.raises(TrapoError, match=named) as error:
        plan(override)
    assert "\n" not in str(error.value)
