import pytest

from trapo.config import Config, changed_keys, load_config, merge_config, preset_names, save_config
from trapo.errors import TrapoError
from trapo.modes import phases


def test_overrides_change_single_keys_and_keep_their_types():
    config = merge_config({"optim": {"lr": 1e-5}}, ["train.steps=7", "guidance.ratios=[0,1]", "eval.before=false"])
    assert config.optim.lr == 1e-5
    assert config.train.steps == 7
    assert config.guidance.ratios == [0.0, 1.0]
    assert config.eval.before is False


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.learning_rat=1", "optim.learning_rat: unknown key; did you mean optim."),
        ("trian.steps=1", "trian: unknown key; did you mean train?"),
        ("train.step=1", "did you mean train.steps?"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps: got 0; must be >= 1"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("mode=ppo", "mode: got 'ppo'; accepted: trapo"),
        ("model=3", "model: expected a group of keys, got 3"),
        ("guidance.cut=word", "guidance.cut: got 'word'; accepted: token, blank_line"),
        ("train.steps", "override 'train.steps': expected key=value"),
        ("train.sft_steps=3", "train.sft_steps: only mode sft_then_rl"),
        ("mode=sft_then_rl", "train.sft_steps: mode sft_then_rl needs"),
        ("eval.benchmarks=[a", "override 'eval.benchmarks=[a': not readable"),
        ("optim.betas=[2,0.9]", "optim.betas: got [2.0, 0.9]"),
        ("optim.lr=.inf", "optim.lr: got inf"),
        ("data.eval=???", "data.eval: got ???"),
        ("eval.samples=4", "eval.samples: got 4 with eval.temperature=0"),
        ("objective.tis_cap=2", "objective.tis_cap: needs the engine's log-probabilities, which rollout.engine=hf"),
        ("rollout.engine=vllm_server", "rollout.server_url: got None with rollout.engine=vllm_server"),
        ("rollout.server_url=http://localhost:8000", "rollout.server_url: got http://localhost:8000 with rollout.en"),
        ("rollout.guard_tolerance=0", "rollout.guard_tolerance: got 0"),
    ],
)
def test_bad_keys_and_values_give_one_line_that_names_the_key(override, named):
    with pytest.raises(TrapoError) as error:
        merge_config({}, [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_keys_in_a_file_are_refused_too(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {lrr: 1}\n")
    with pytest.raises(TrapoError, match=r"optim\.lrr: unknown key; did you mean optim\.lr\?"):
        load_config(path)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    if text:
        with pytest.raises(TrapoError, match=r"c\.yaml"):
            load_config(path)
    else:
        assert load_config(path) == Config()


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = merge_config({}, ["train.steps=3", "guidance.sizes=[2,2]", "objective.alpha=0.2"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_changed_keys_names_the_differences():
    assert changed_keys(merge_config({}), merge_config({}, ["optim.lr=1", "seed=2"])) == ["optim.lr", "seed"]


def test_a_preset_is_found_by_name_and_by_presets_path_and_a_typo_gets_a_hint():
    assert load_config("demo") == load_config("presets/demo.yaml")
    with pytest.raises(TrapoError, match="did you mean official"):
        load_config("oficial")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_makes_a_plan(name):
    config = load_config(name)
    assert sum(phase.steps for phase in phases(config)) == config.train.steps


def test_presets_cover_the_paper_the_official_code_and_a_laptop():
    assert {"paper", "official", "demo", "smollm2-gsm8k"} <= set(preset_names())
