"""What stands beside the keys: sentences, bounds, hints, every field of an Objective; and what is made of it."""

from __future__ import annotations

import ast
import dataclasses
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import trapo_kernels as tk
from trapo.config import Config, load_config, merge_config, preset_names, save_config
from trapo.errors import TrapoError
from trapo.modes import MODES, phases
from trapo.settings import table
from trapo.settings.keys import keys_of
from trapo.settings.words import NOTES, WORDS

ROOT = Path(__file__).parents[1]
KEYS = {key.name: key for key in keys_of(Config)}
FIELDS = [field.name for field in dataclasses.fields(tk.Objective)]
# A value of each field that no mode and no default has, and the fields that must change with it.
GIVEN = {
    "expert": ("dft", {}),
    "alpha": (0.3, {}),
    "expert_coef": (0.5, {}),
    "policy": ("sapo", {}),
    "clip_low": (0.15, {}),
    "clip_high": (0.35, {}),
    "dual_clip": (3.5, {}),
    "entropy_coef": (0.25, {}),
    "kl_coef": (0.125, {}),
    "tis_cap": (2.5, {"rollout": {"engine": "vllm"}}),
    "luffy_gamma": (0.75, {}),
    "policy_coef": (0.625, {}),
    "reduction": ("sequence_mean", {}),
    "sed_coef": (0.5, {}),
    "sed_k": (7, {}),
    "sed_tau": (0.5, {}),
    "eaft_power": (2.0, {}),
    "asft_kl": (0.5, {}),
    "pear_gamma": (0.5, {}),
    "pear_low": (-0.5, {}),
    "pear_high": (0.5, {}),
    "pear_floor": (-4.0, {}),
    "pear_ceil": (4.0, {}),
    "lco_beta": (0.5, {}),
    "lco_neg": (0.5, {}),
    "sapo_tau_pos": (0.5, {}),
    "sapo_tau_neg": (0.5, {}),
    "dppo_cap": (3.0, {}),
    "tis_low": (0.5, {}),
    "tis_mode": ("mask", {}),
    "tis_level": ("sequence", {}),
    "off_policy_mask": (0.5, {}),
    "pear_level": ("block", {}),
    "pear_block": (2, {}),
}


def objective(*overrides, base=None):
    (phase,) = phases(merge_config(base or {}, overrides))
    return phase.objective


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_an_objective_comes_from_yaml_and_changes_nothing_else(name, tmp_path):
    value, base = GIVEN[name]
    merged = merge_config({**base, "objective": {name: value}})
    save_config(merged, tmp_path / "c.yaml")
    config = load_config(tmp_path / "c.yaml")
    assert config == merged
    (phase,) = phases(config)
    assert getattr(phase.objective, name) == value != getattr(tk.Objective.trapo(), name)
    assert phase.objective == dataclasses.replace(tk.Objective.trapo(), **{name: value})


TERMS = """
def hinge(logprobs, advantages, slope=2.0):
    return -slope * advantages * logprobs
number = 3
def ratio(logprobs, old_logprobs):
    return (logprobs - old_logprobs).exp()
def sampled(logprobs, rollout_logprobs):
    return (logprobs - rollout_logprobs).exp()
def wrong(nothing_of_this_name):
    return nothing_of_this_name
"""


@pytest.mark.parametrize("name", ["./my_terms_of_a_test.py:hinge", "my_terms_of_a_test:hinge"])
@pytest.mark.parametrize("field", ["expert", "policy"])
def test_a_term_may_be_a_function_of_a_file_or_of_a_module(field, name, tmp_path, monkeypatch):
    (tmp_path / "my_terms_of_a_test.py").write_text(TERMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_terms_of_a_test", raising=False)
    term = getattr(objective(f"objective.{field}={name}"), field)
    assert term(torch.tensor([-1.0]), torch.tensor([0.5])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "objective.expert=./none.py:f",
            "objective.expert: './none.py:f' cannot be imported: FileNotFoundError: no file",
        ),
        ("objective.policy=./t.py:missing", "objective.policy: './t.py:missing' cannot be imported: AttributeError"),
        ("objective.policy=./t.py:number", "objective.policy: './t.py:number' is a int, not a function"),
        ("objective.policy=./t.py:wrong", "objective: wrong: parameters must be among logprobs"),
        (
            "objective.policy=./t.py:ratio",
            "objective: policy=ratio needs old log-probabilities, which there are from tra",
        ),
        (
            "objective.policy=./t.py:sampled",
            "objective: policy=sampled needs the engine's log-probabilities, which rollout",
        ),
        ("objective.expert=nll", "objective: Objective: expert must be one of 'sft', 'trsft'"),
        ("objective.reduction=mean", "objective: Objective: reduction must be one of 'token_mean'"),
    ],
)
def test_a_term_that_cannot_be_used_is_refused_in_one_line(override, said, tmp_path, monkeypatch):
    (tmp_path / "t.py").write_text(TERMS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrapoError) as error:
        objective(override)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_none_is_no_term_and_an_infinite_clip_is_no_clip_whatever_the_mode_has():
    assert objective("objective.expert=none").expert is None
    assert objective("objective.policy=none").policy is None
    grpo = objective("mode=grpo", "objective.clip_low=.inf", "objective.clip_high=inf", "objective.dual_clip=inf")
    assert (grpo.clip_low, grpo.clip_high, grpo.dual_clip) == (None, None, None)


def test_means_over_sequences_and_over_regions_are_not_mixed():
    with pytest.raises(
        TrapoError, match=r"train\.normalizer: got regions with objective\.reduction=sequence_mean; means"
    ):
        merge_config({}, ["train.normalizer=regions", "objective.reduction=sequence_mean"])


def test_rewards_are_had_without_a_policy_term_where_guidance_depends_on_them():
    (phase,) = phases(merge_config({}, ["objective.policy=none"]))
    assert phase.needs_rewards
    assert "advantages" not in phase.objective.needs


def test_a_key_that_changes_what_the_mode_is_wins_and_that_is_said_in_one_line():
    (phase,) = phases(merge_config({}, ["mode=nll_prefix", "objective.expert=dft", "objective.alpha=0.2"]))
    assert phase.objective.expert == "dft"
    assert phase.overruled == ("objective.expert=dft takes the place of mode nll_prefix's sft",)
    (phase,) = phases(merge_config({}, ["mode=grpo", "objective.clip_low=0.3", "objective.expert=none"]))
    assert phase.overruled == ("objective.clip_low=0.3 takes the place of mode grpo's 0.2",)


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_changes_what_its_mode_is(name):
    assert [phase.overruled for phase in phases(load_config(name))] == [()]


def test_a_clip_of_the_mode_that_a_policy_term_cannot_have_is_refused_with_what_to_do():
    with pytest.raises(TrapoError, match=r"mode grpo sets clip_low=0\.2, which objective\.clip_low=inf takes away"):
        objective("mode=grpo", "objective.policy=sapo")
    assert objective("mode=grpo", "objective.policy=sapo", "objective.clip_low=inf", "objective.clip_high=inf")


def test_every_key_has_a_sentence():
    assert [key.name for key in KEYS.values() if not re.fullmatch(r"\S.{7,220}\.", key.doc)] == []


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.least is not None or key.above is not None])
def test_every_bound_holds_and_its_error_says_it(name):
    key, low = KEYS[name], KEYS[name].least if KEYS[name].least is not None else KEYS[name].above
    sign = ">=" if key.least is not None else ">"
    for value in (low - 1, math.nan, math.inf, *([low] if sign == ">" else [])):
        with pytest.raises(TrapoError, match=re.escape(f"{name}: got {value}; must be {sign} {low}, and finite")):
            key.check(value)
    key.check(low + 1)
    if sign == ">=":
        key.check(low)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.choices])
def test_every_choice_is_accepted_and_nothing_else(name):
    for choice in KEYS[name].choices:
        KEYS[name].check(choice)
    with pytest.raises(
        TrapoError, match=re.escape(f"{name}: got 'none of them'; accepted: {next(iter(KEYS[name].choices))}")
    ):
        merge_config({}, [f"{name}=none of them"])


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.named])
def test_a_text_that_names_something_is_not_empty(name):
    with pytest.raises(TrapoError, match=rf"{name}: got an empty text"):
        merge_config({}, [f'{name}=[""]' if name in ("eval.benchmarks", "lora.targets") else f"{name}="])


def test_defaults_are_accepted_by_their_own_keys():
    for key in KEYS.values():
        key.check(key.default)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_other_trainers_is_answered_with_a_key_that_there_is(word):
    assert WORDS[word] in KEYS
    for key in (word, f"train.{word}"):
        with pytest.raises(TrapoError, match=rf"^{key}: unknown key; did you mean {re.escape(WORDS[word])}[?( ]"):
            merge_config({}, [f"{key}=1"])


def test_notes_are_of_words():
    assert NOTES.keys() <= WORDS.keys()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "optim.lr"),
        ("steps", "train.steps"),
        ("rollout.n", "guidance.group_size"),
        ("actor_rollout_ref", "model, optim, rollout, objective and train"),
        ("temperature", "rollout.temperature"),
        ("rollout.bach_size", "rollout.batch_size"),
        ("optim.learning_rat", "optim.lr"),
        ("trian", "train"),
        ("train.warmup_steps", "optim.warmup_steps"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_key_in_its_group_or_elsewhere(given, meant):
    with pytest.raises(TrapoError, match=rf"did you mean {re.escape(meant)}\?"):
        merge_config({}, [f"{given}=1"])


# Who may be handed the whole configuration: the two commands' roots, and the resolver of modes. config.py makes it, and
# the table of its keys and the report of a run on disk read it.
WHOLE = {"trapo/config.py", "trapo/cli.py", "trapo/trainer.py"}
WHOLE |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "trapo" / "modes").glob("*.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "trapo").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_part_takes_the_whole_configuration(path):
    if path.relative_to(ROOT).as_posix() in WHOLE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hints = [a.annotation for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        else:
            hints = [node.annotation] if isinstance(node, ast.AnnAssign) else []
        named = {n.id for hint in hints if hint for n in ast.walk(hint) if isinstance(n, ast.Name)}
        texts = {n.value for hint in hints if hint for n in ast.walk(hint) if isinstance(n, ast.Constant)}
        assert "Config" not in named | texts, f"{path}:{node.lineno} takes the whole configuration"


def printed(word=None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=400)
    for each in table.tables(word):
        console.print(each)
    return out.getvalue()


def test_all_keys_and_modes_are_printed_with_default_choices_and_sentence():
    lines = printed().splitlines()
    for key in KEYS.values():
        (line,) = [line for line in lines if line.startswith(f"{key.name} ") and key.doc in line]
        assert key.accepts in line
        assert table.shown(key.default) in line
    for mode in MODES.values():
        assert any(line.startswith(f"{mode.name} ") and mode.doc in line for line in lines)


def test_a_word_picks_keys():
    assert [line.split()[0] for line in printed("W&B").splitlines() if line.startswith("log.")] == ["log.wandb"]
    with pytest.raises(TrapoError, match="no key with 'xyzzy'"):
        printed("xyzzy")


def test_the_page_of_the_documentation_has_every_key_mode_and_preset():
    hooks: dict = {"__file__": str(ROOT / "docs" / "hooks.py")}
    exec(Path(hooks["__file__"]).read_text(), hooks)
    source = (ROOT / "docs" / "config.md").read_text()
    page = hooks["on_page_markdown"](source)
    assert not re.search("<!-- (config|modes|presets) -->", page)
    for name in (*KEYS, *MODES, *preset_names()):
        assert f"| `{name}` |" in page
    width = {line.count(" | ") for line in page.splitlines() if line.startswith("| `") and "." in line.split("`")[1]}
    assert width <= {3, 1}
