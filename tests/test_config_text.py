"""Texts in a configuration: taken as they stand, written so that they come back, never more than was written shown."""

import copy
import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trapo.config import load_config, merge_config, save_config
from trapo.errors import TrapoError
from trapo.settings.text import Expression, escape, is_expression, plain_tree, shown_yaml, unescape
from trapo.tools.terminal import plain_keys

HARD = [
    "End with #### and the answer.",
    " Let's think  ",
    "007",
    "1e5",
    "yes",
    "on",
    "",
    "Note: be brief",
    "*x*",
    r"\${x}",
    "${x}",
    "${",
    r"\\${x}^2$ \frac{1}{2}",
    "${oc.env:HOME}",
    "'quoted'",
    '"quoted"',
    "[a, b]",
    "{a: 1}",
    "- a",
    "&a",
    "!!python/object:os.system",
    "%",
    "@",
    "`",
    "a=b",
    "~",
    "None",
    "a\nb\n\n c\r\n",
    "\t",
    "\u0085\u2028\u2029\ufeff\x07\x1b[0m",
    "😀 ü",
    "2026-01-01",
    "1:30",
    "0x1F",
    "<<",
    "=",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    st.text(alphabet="${}\\:#'\" \n-[],&*!|>%@`?x1", max_size=12),
).filter(lambda text: text != "???")


@pytest.mark.parametrize("text", HARD)
def test_text_on_the_command_line_is_taken_as_it_stands(text):
    keys = ["data.prompt_suffix", "data.system_prompt", "model.freeze", *(["run_dir", "data.eval"] if text else [])]
    config = merge_config({}, [f"{key}={text}" for key in keys])
    found = [
        config.data.prompt_suffix,
        config.data.system_prompt,
        config.model.freeze,
        config.run_dir,
        config.data.eval,
    ]
    assert found[: len(keys)] == [text] * len(keys)


def test_null_is_no_text_where_there_may_be_none():
    base = {"data": {"system_prompt": "x", "eval": "y"}}
    config = merge_config(base, ["data.system_prompt=null", "data.eval=null"])
    assert (config.data.system_prompt, config.data.eval) == (None, None)
    assert merge_config({}, ["data.prompt_suffix=null"]).data.prompt_suffix == "null"


@given(prompt=TEXTS, suffix=TEXTS, several=st.lists(TEXTS.filter(bool), max_size=20))
@settings(max_examples=40, deadline=None)
@example(prompt="", suffix="a\\", several=[text for text in HARD if text])
def test_every_text_survives_a_save(prompt, suffix, several, tmp_path_factory):
    config = merge_config({})
    config.data.system_prompt, config.data.prompt_suffix, config.lora.targets = prompt, suffix, several
    config.rollout.engine_args = {"a": prompt, "b": [*several, {"c": 1.5}]}
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert shown_yaml(path)["data"]["system_prompt"] == prompt


@given(text=TEXTS, another=TEXTS)
@settings(max_examples=40, deadline=None)
def test_an_override_says_what_its_text_is(text, another):
    config = merge_config({}, [f"data.prompt_suffix={text}", f"model.freeze={another}?"])
    assert (config.data.prompt_suffix, config.model.freeze) == (text, another + "?")
    assert unescape(escape(text)) == text
    assert not is_expression(escape(text))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=0100", 100),
        ("train.steps=1_000", 1000),
        ("train.threads=null", None),
        ("train.threads=", None),
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=3", 3.0),
        ("eval.before=false", False),
        ("eval.before=Yes", True),
        ("eval.benchmarks=[007, aime24@8, 'a #2.jsonl']", ["007", "aime24@8", "a #2.jsonl"]),
        ("lora.targets=[yes, '${x}']", ["yes", "${x}"]),
        ("guidance.ratios=[0, 0.5]", [0.0, 0.5]),
        ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("rollout.engine_args={max_model_len: 10, name: yes}", {"max_model_len": 10, "name": True}),
        ("rollout.engine_args.max_model_len=10", {"max_model_len": 10}),
    ],
)
def test_fields_that_are_no_text_are_typed_by_the_schema(override, value):
    found = merge_config({}, [override])
    for part in override.split("=")[0].split(".")[:2]:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=1:30", "train.steps: got '1:30'; expected a whole number"),
        ("train.steps=1e3", "train.steps: got '1e3'; expected a whole number"),
        ("train.steps=7 # seven", "train.steps: got '7 # seven'; expected a whole number"),
        ("train.steps=" + "9" * 5000, "train.steps: got '999"),
        ("optim.lr=fast", "optim.lr: got 'fast'; expected a number"),
        ("eval.before=perhaps", "eval.before: got 'perhaps'; expected true or false"),
        ("train.steps=${x}", "train.steps: Interpolation key 'x' not found"),
        ("train.steps=${", "train.steps: "),
        ("train.steps=${train.steps}", "train"),
        ("run_dir=a\0b", r"run_dir: got 'a\x00b'; a text cannot hold NUL"),
        ("run_dir=a\udc80b", "run_dir: got 'a\\udc80b'; a text cannot hold NUL or bytes that are not UTF-8"),
        ('eval.benchmarks=["a\\0b"]', "eval.benchmarks: "),
        ("run_dir=", "run_dir: got an empty text"),
        ("data.eval=", "data.eval: got an empty text"),
        ("model.path.x=1", "model.path: has no keys of its own; got model.path.x"),
        ("optim={lrr: 1}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("=1", ": unknown key"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(override, named):
    with pytest.raises(TrapoError) as error:
        merge_config({}, [override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("data: {system_prompt: 'Write ${x}'}", "Interpolation key 'x' not found"),
        ("run_dir: ${", "c.yaml: not readable as YAML: no viable alternative"),
        ("run_dir: ${nothing:1}", "nothing"),
        ("run_dir: ${run_dir}", "run_dir"),
        ("optim: ${model}", "optim: expected a group of keys"),
        ("run_dir: ${oc.env:TRAPO_TEST_UNSET}", "TRAPO_TEST_UNSET"),
        ("run_dir: ???", "run_dir: got ???"),
        ("lora: {targets: ['???']}", "lora.targets: got ???"),
        ("run_dir: a\0b", "not readable as YAML"),
        ("- ${x}", "expected a mapping"),
        ("run_dir: [" * 2000, "not readable as YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(yaml, named, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml + "\n")
    with pytest.raises(TrapoError) as error:
        load_config(tmp_path / "c.yaml")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_another_encoding_is_refused_in_one_line(tmp_path):
    (tmp_path / "c.yaml").write_bytes("run_dir: Größe".encode("latin-1"))
    with pytest.raises(TrapoError, match=r"c\.yaml: not readable as YAML"):
        load_config(tmp_path / "c.yaml")


def test_a_plain_scalar_of_a_file_is_text_where_the_field_is_text(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: 007\ndata: {prompt_suffix: yes, system_prompt: 1e5, train: ~}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.run_dir, config.data.prompt_suffix) == ("007", "yes")
    assert (config.data.system_prompt, config.data.train) == ("1e5", None)


def test_expressions_of_a_file_see_the_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: runs/${mode}-${seed}\n")
    assert load_config(tmp_path / "c.yaml", ["mode=grpo", "seed=3"]).run_dir == "runs/grpo-3"


def test_what_the_environment_gave_is_used_and_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAPO_TEST_TOKEN", "s3cret")
    (tmp_path / "c.yaml").write_text(
        "rollout:\n  engine: vllm_server\n  server_url: http://u:${oc.env:TRAPO_TEST_TOKEN}@host\n"
        "  engine_args: {key: '${oc.env:TRAPO_TEST_TOKEN}', keys: ['${oc.env:TRAPO_TEST_TOKEN}']}\n"
        "data: {dir: '${rollout.server_url}'}\nrun_dir: runs/${mode}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert config.rollout.server_url == "http://u:s3cret@host" == config.data.dir
    assert config.rollout.engine_args == {"key": "s3cret", "keys": ["s3cret"]}
    assert config.run_dir == "runs/trapo"
    assert isinstance(copy.deepcopy(config).rollout.server_url, Expression)
    save_config(dataclasses.replace(config, seed=1), tmp_path / "saved.yaml")
    assert "s3cret" not in (tmp_path / "saved.yaml").read_text()
    assert "s3cret" not in str(plain_tree(config)) + str(shown_yaml(tmp_path / "saved.yaml"))
    assert load_config(tmp_path / "saved.yaml") == dataclasses.replace(config, seed=1)


def test_keys_that_are_written_as_options_are_keys():
    given = ["train", "demo", "--train.steps=3", "--eval.before=true", "--if-finished", "--out=a.b", "reward.x=--a.b=c"]
    expected = ["train", "demo", "train.steps=3", "eval.before=true", "--if-finished", "--out=a.b", "reward.x=--a.b=c"]
    assert plain_keys(given) == expected
