"""A key that changes nothing in a run is named in one line when the run starts."""

import pytest
from typer.testing import CliRunner

import trapo_kernels as tk
from trapo.cli import app
from trapo.config import default_tree, load_config, merge_config, preset_names
from trapo.modes import MODES, phases
from trapo.settings.text import flat, tree_of
from trapo.settings.unused import unused


def named(*overrides, base=None):
    """The keys in the line."""
    config = base or merge_config({}, overrides)
    plan = phases(config)
    objectives, schedules = [p.objective for p in plan], [p.schedule for p in plan]
    line = unused(flat(tree_of(config)), flat(default_tree()), objectives, schedules, config.mode)
    assert line is None or "\n" not in line
    body = (line or "").removeprefix("WARNING: without effect in this run: ")
    return [part.partition("=")[0] for part in body.split("; ") if part]


STEPS = {"sft_then_rl": ["train.sft_steps=3"], "distill": ["distill.teacher=runs/sft/final"], "bridge": ["lora.rank=2"]}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_by_itself_has_none(mode):
    assert named(f"mode={mode}", *STEPS.get(mode, [])) == []


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_none_once_it_has_its_data(name):
    assert named(base=load_config(name, ["data.eval=a.jsonl", "data.train=b.jsonl"])) == []


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["objective.luffy_gamma=0.3"], ["objective.luffy_gamma"]),
        (["mode=nll_prefix", "objective.alpha=0.2"], ["objective.alpha"]),
        (["mode=luffy", "objective.alpha=0.2", "objective.luffy_gamma=0.3"], ["objective.alpha"]),
        (["mode=grpo", "objective.expert=dft", "objective.clip_low=0.3"], ["objective.expert"]),
        (["mode=grpo", "objective.expert_coef=2"], ["objective.expert_coef"]),
        (["mode=sft", "objective.policy=clip"], ["objective.policy"]),
        (["mode=sft", "objective.sapo_tau_pos=2"], ["objective.sapo_tau_pos"]),
        (["mode=sft_then_rl", *STEPS["sft_then_rl"], "advantage.baseline=unguided", "objective.alpha=0.2"],
         ["objective.alpha"]),
        (["objective.sed_k=7", "objective.expert=sed"], []),
        (["objective.policy_coef=0", "objective.clip_high=0.3"], ["objective.clip_high"]),
        (["mode=grpo", "guidance.ratios=[0,0,0,1]", "guidance.sizes=[1,1,1,1]", "guidance.cut=token"],
         ["guidance.ratios", "guidance.cut"]),
        (["mode=sft", "guidance.sizes=[1,1,1,1]", "advantage.baseline=unguided", "reward.workers=3"],
         ["advantage.baseline", "reward.workers", "guidance.sizes"]),
        (["mode=sft", "data.eval=a.jsonl", "reward.workers=3"], []),
        (["rollout.engine_args={dtype: half}", "rollout.weight_sync=nccl", "rollout.guard_tokens=8"],
         ["rollout.engine_args.dtype", "rollout.weight_sync", "rollout.guard_tokens"]),
        (["rollout.engine=vllm", "rollout.engine_args={dtype: half}", "rollout.guard_tokens=8"], []),
        (["lora.alpha=8", "train.normalizer_constant=5", "log.rollouts=3", "log.rollouts_every=0"],
         ["train.normalizer_constant", "lora.alpha", "log.rollouts"]),
        (["eval.every=5", "checkpoint.keep_best=1"], ["eval.every", "checkpoint.keep_best"]),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_named(overrides, keys):
    assert sorted(named(*overrides)) == sorted(keys)


@pytest.mark.parametrize("expert", [name for name in tk.EXPERT_TERMS if name not in ("asft", "pear")])
def test_a_field_of_another_expert_term_is_named(expert):
    own = set(tk.EXPERT_TERMS[expert].fields)
    values = {"alpha": 0.2, "luffy_gamma": 0.3, "sed_k": 7, "eaft_power": 2.0, "lco_beta": 0.5}
    overrides = [f"objective.{field}={value}" for field, value in values.items()]
    left = {f"objective.{field}" for field in values if field not in own}
    assert set(named(f"objective.expert={expert}", *overrides)) == left


def test_a_run_says_it_in_one_line(tiny_model_path, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "2+2", "answer": "4", "trace": "#### 4"}\n')
    done = CliRunner().invoke(app, [
        "train", "demo", f"model.path={tiny_model_path}", f"data.train={tmp_path / 'own.jsonl'}", "data.eval=null",
        f"run_dir={tmp_path / 'run'}", "mode=sft", "train.steps=1", "train.prompts_per_step=1", "optim.warmup_steps=0",
        "objective.luffy_gamma=0.5",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "objective.luffy_gamma=0.5 (no term reads it: expert=trsft, policy=none)" in said
