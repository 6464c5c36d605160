"""What `auto` and `fastest` are on a machine, and what is said where it lacks something."""

import dataclasses
import importlib.util

import pytest
import torch

from trapo.config import load_config, merge_config, settle
from trapo.models import fastest
from trapo.settings.groups import ModelConfig, RolloutConfig

ASKED = ({"attention": "fastest"}, {"engine": "auto", "dtype": "bfloat16"})


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with such a device and these modules beside torch."""

    def make(device, *modules):
        monkeypatch.setattr(fastest, "device_of", lambda name: torch.device(device))
        real = importlib.util.find_spec
        others = {"vllm": "vllm" in modules, "flash_attn": "flash_attn" in modules}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: others[name] if name in others else real(name))

    return make


def settled(precision="auto"):
    model, rollout = ModelConfig(**ASKED[0]), RolloutConfig(**ASKED[1])
    said = fastest.settle(model, rollout, precision)
    return model.attention, rollout.engine, rollout.dtype, said


def test_a_gpu_with_everything_gets_everything_and_no_word(machine):
    machine("cuda", "vllm", "flash_attn")
    assert settled() == ("flash_attention_2", "vllm", "bfloat16", None)


def test_what_is_not_installed_is_said_in_one_line_with_the_command_that_gets_it(machine):
    machine("cuda")
    attention, engine, dtype, said = settled()
    assert (attention, engine, dtype) == ("auto", "hf", None)
    assert "rollout.engine=hf in place of vllm (vLLM is not installed: pip install vllm)" in said
    assert "model.attention=auto in place of flash_attention_2 (flash-attn is not installed: pip install" in said
    assert "\n" not in said


def test_flash_attention_is_not_for_float32(machine):
    machine("cuda", "vllm", "flash_attn")
    attention, _, _, said = settled("float32")
    assert attention == "auto"
    assert "(train.precision is float32)" in said


def test_a_cpu_has_none_of_it(machine):
    machine("cpu", "vllm", "flash_attn")
    attention, engine, dtype, said = settled()
    assert (attention, engine, dtype) == ("auto", "hf", None)
    assert said.count("(no GPU)") == 3  # vLLM, flash attention and bfloat16


@pytest.mark.parametrize("preset", ["paper", "official", "qwen2.5-math-7b"])
def test_presets_for_gpus_ask_for_the_fastest_and_run_without_it(preset):
    asked = load_config(preset)
    assert (asked.rollout.engine, asked.rollout.dtype) == ("auto", "bfloat16")
    assert (asked.model.attention, asked.train.precision) == ("fastest", "auto")
    if torch.cuda.is_available():
        pytest.skip("what is settled depends on the machine")
    said = []
    found = settle(asked, said.append)
    assert len(said) == 1
    assert (found.rollout.engine, found.model.attention) == ("hf", "auto")
    assert asked.rollout.engine == "auto"  # the caller's own is left alone


def test_what_is_named_stays_and_nothing_is_said(monkeypatch):
    monkeypatch.setenv("TRAPO_TEST_ATTENTION", "eager")
    named = merge_config({}, ["model.attention=${oc.env:TRAPO_TEST_ATTENTION}", "rollout.engine=vllm"])
    said = []
    assert dataclasses.asdict(settle(named, said.append)) == dataclasses.asdict(named)
    assert said == []
