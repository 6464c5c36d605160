"""Which reward functions are accepted, and how they are called."""

import sys
import textwrap

import numpy as np
import pytest
import torch

from trapo.errors import TrapoError
from trapo.rewards import RewardPool, functions
from trapo.rewards.functions import as_number, resolve

ROW = {"prompt": [{"role": "user", "content": "2+2?"}], "id": "p1", "source": "test"}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a file of reward functions; gives the name of one of them."""
    monkeypatch.chdir(tmp_path)

    def write(source, name="f", stem="written"):
        (tmp_path / f"{stem}.py").write_text(textwrap.dedent(source))
        functions.resolve.cache_clear()
        return f"./{stem}.py:{name}"

    yield write
    sys.modules.pop("trapo_reward_written", None)


@pytest.mark.parametrize(
    "source",
    [
        "def f(text, answer): return float(text == answer)",
        "def f(response, gold): return text_equal(response, gold)\ndef text_equal(a, b): return a == b",
        "async def f(text, answer): return float(text == answer)",
        "def f(*args): return float(args[0] == args[1])",
        "def f(text, answer, id): return float(text == answer and id == 'p1')",
        "def f(text, answer, *, prompt, source): return float(text == answer and prompt[0]['content'] == '2+2?')",
        "def f(text, answer, **row): return float(text == answer and row['id'] == 'p1')",
        "def f(text, answer, strict=True): return float(text == answer and strict)",
        "from functools import partial\ndef g(text, answer, to): return to * (text == answer)\nf = partial(g, to=1.0)",
        "class F:\n    def __call__(self, text, answer): return float(text == answer)\nf = F()",
        # TRL's
        "def f(completions, **columns): return [float(c == a) for c, a in zip(completions, columns['answer'])]",
        "def f(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]",
        "def f(prompts, completions, solution): return [float(c == a) for c, a in zip(completions, solution)]",
        "def f(completions, ground_truth, id, **kwargs): return [float(completions == ground_truth and id == ['p1'])]",
        "async def f(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]",
        "import numpy as np\ndef f(completions, answer, **kw): return np.array(completions) == np.array(answer)",
        # verl's
        "def f(data_source, solution_str, ground_truth, extra_info=None): return float(solution_str == ground_truth)",
        "def f(data_source, solution_str, ground_truth, **kw): return {'score': float(solution_str == ground_truth)}",
    ],
)
def test_every_usual_signature_is_understood(module, source):
    function = resolve(module(source))
    assert function("4", "4", ROW) == 1.0
    assert function("5", "4", ROW) == 0.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(text): return 1.0", r"takes \(text\), which cannot be called \(too many positional arguments\)"),
        ("def f(): return 1.0", r"it must take \(text, answer\)"),
        ("def f(text, answer, must): return 1.0", r"missing a required argument: 'must'"),
        ("def f(completions, nothing_like_it): return [1.0]", r"missing a required .*'nothing_like_it'"),
        ("def f(text, answer): return 1.0\nraise SystemExit(3)", r"cannot be imported: SystemExit: 3"),
        ("def g(text, answer): return 1.0", r"cannot be imported: AttributeError"),
        ("f = 3", r"is a int, not a function"),
        ("def f(:", r"cannot be imported: SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_once_and_in_one_line(module, source, message):
    with pytest.raises(TrapoError, match=message) as caught:
        RewardPool(module(source))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrapoError, match=r"cannot be imported: FileNotFoundError: no file .*absent\.py"):
        resolve("./absent.py:f")


def test_a_file_finds_the_modules_beside_it(module, tmp_path):
    (tmp_path / "helper_beside_it.py").write_text("def same(a, b): return float(a == b)\n")
    assert (
        resolve(module("from helper_beside_it import same\ndef f(text, answer): return same(text, answer)"))("4", "4")
        == 1
    )


def test_a_function_in_a_file_runs_in_the_workers(module):
    with RewardPool(
        module("def f(completions, **kw): return [float('4' in c) for c in completions]"), workers=1
    ) as pool:
        assert [r.value for r in pool.score([("4", "4", ROW), ("5", "4", ROW), ("4", "4")])] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "value",
    [
        1,
        1.0,
        True,
        np.bool_(True),
        np.float32(1),
        np.int64(1),
        np.array(1.0),
        np.array(True),
        torch.tensor(1.0),
        torch.tensor(True),
    ],
)
def test_numbers_of_every_library_are_numbers(value):
    number = as_number(value, "f")
    assert (type(number), number) == (float, 1.0)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        np.float32("nan"),
        torch.tensor(float("inf")),
        "1.0",
        None,
        [1.0],
        np.array([1.0, 2.0]),
        1j,
    ],
)
def test_what_is_no_finite_number_is_refused_with_what_it_was(value):
    with pytest.raises(ValueError, match=r"^f must return a finite number; got "):
        as_number(value, "f")


@pytest.mark.parametrize("returned", ["1.0", "[1.0, 0.0]", "[]", "'1'", "None"])
def test_trls_way_must_return_one_reward_for_each_completion(module, returned):
    function = resolve(module(f"def f(completions, **columns): return {returned}"))
    with pytest.raises(ValueError, match="one reward for each of its completions"):
        function("4", "4", ROW)


def test_math_verify_alone_is_the_library_as_it_is():
    direct = resolve("math_verify")
    assert direct("the answer is $\\frac{1}{2}$", "0.5") == 1.0
    assert direct("so 24", "24") == 1.0  # it needs no mark: that is the difference
    assert direct("so 25", "24") == 0.0
    with RewardPool("math_verify", workers=1) as pool:
        assert [r.value for r in pool.score([("so 24", "24"), ("so 25", "24")])] == [1.0, 0.0]
