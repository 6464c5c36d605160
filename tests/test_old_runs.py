"""Runs that earlier versions began go on: their configurations read back, and their digests have not changed.

The digests are those that commit 9116df5 computed, before each key had its metadata and every field of an Objective was
a key. A key that is new must not make a stranger of a run that does not set it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from trapo.config import changed_keys, load_config, load_tree, merge_config
from trapo.runs.history import config_digest
from trapo.runs.run_dir import FREE_KEYS, STEPS
from trapo.settings.text import tree_of

OLD = Path(__file__).with_name("old_config.yaml")  # as that commit wrote it into a run's folder
MANY = {
    "mode": "grpo",
    "seed": 3,
    "model": {"path": "x/y", "freeze": "embed"},
    "data": {"train": "a.jsonl", "system_prompt": "s \\${x}", "prompt_suffix": "?"},
    "guidance": {"preset": "official", "sizes": [2, 2], "ratios": [0, 0.5], "thresholds": [-1, 0.5]},
    "objective": {
        **{"expert": "dft", "alpha": 0.2, "expert_coef": 2, "luffy_gamma": 0.3, "policy": "clip", "clip_low": 0.1},
        **{"clip_high": 0.3, "dual_clip": 3, "entropy_coef": 0.01, "kl_coef": 0.02},
    },
    "advantage": {"std": True},
    "rollout": {"engine_args": {"a": 1, "b": {"c": [1, "x"]}}, "temperature": 0.7},
    "reward": {"range": [0, 2]},
    "optim": {"betas": [0.8, 0.9], "lr": 1e-4},
    "lora": {"targets": ["q_proj"]},
    "train": {"steps": 7},
}
DIGEST = "2f96c7972010152d8eb500bdbae7b04f9eeacbb850bb1200fc2efd42ccf7174a"


def digest(settings):
    return config_digest(settings, (*FREE_KEYS, STEPS))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        (MANY, DIGEST),
        (
            {"objective": {"tis_cap": 2.0}, "rollout": {"engine": "vllm"}},
            "d90221b2f2a09dd6609c18cde16a81a3def643b658f692fe471ca6e767750a3e",
        ),
    ],
)
def test_settings_have_the_digest_that_they_had(base, expected):
    assert digest(tree_of(merge_config(base))) == expected


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("demo", "5558fa4e4d02e0dc7bde26d052b8d8d0a7b665a1f8ee0428852764988640471c"),
        ("paper", "2cc281c43076206cd42c4f897f29d037cc735b12f349392d160b6f757a9feddf"),
        ("official", "9ec9a57d2b8e94e3e746a45ef6a0044198ec9929e9b4cc58d820447cc9a76202"),
        ("qwen2.5-math-7b", "9ec9a57d2b8e94e3e746a45ef6a0044198ec9929e9b4cc58d820447cc9a76202"),
        ("smollm2-gsm8k", "a4c331d5c71d272e97d8a4ba2ce5ff590f990ec8c17f0f20e1bedb09f064ceb9"),
    ],
)
def test_presets_have_the_digest_that_they_had(preset, expected):
    """A preset that is changed on purpose gets a new digest here: runs of the old one do not go on by it."""
    assert digest(tree_of(load_config(preset))) == expected


def test_a_configuration_that_an_earlier_version_saved_is_the_same_today():
    assert changed_keys(load_tree(OLD), merge_config(MANY)) == []
    assert digest(load_tree(OLD)) == DIGEST
