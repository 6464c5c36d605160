"""What counts as a right answer, and what a pool of workers survives."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trapo.rewards import FINAL_ANSWER, Reward, RewardPool, final_answer, math_reward

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # workers get the path of this process, and import reward_fixtures by name
    sys.path.insert(0, HERE)
MISBEHAVE = "reward_fixtures:misbehave"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 7 = 12\n#### 12", "12"),
        ("#### 1\nNo, wait.\n#### 2", "2"),
        ("####\n\n 12 \nand so on", "12"),
        ("#### 12<|im_end|>", "12"),
        ("#### **12**", "12"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"#### 1" "\n" r"\boxed{2}", "2"),
        (r"\boxed{2}" "\n#### 1", "1"),
        (r"\boxed{2", None),
        (r"\boxed", None),
        ("5 + 7 = 12. The answer is 12", "12"),
        ("The answer is 12. Then 13", None),
        ("<answer>13</answer>. The answer is 12", "13"),
        ("12", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_marked_one(text, expected):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("24", "24"),
        (" $24.", "24"),
        ("24.0", "24"),
        ("024", "24"),
        ("1,234", "1234"),
        ("1234", "1,234"),
        ("-7", "-7"),
        ("24 apples", "24"),
        ("Tom has 24 apples left.", "24"),
        ("12 * 2 = 24", "24"),
        ("x = 24", "24"),
        (r"24 \text{ apples}", "24"),
        ("142", "142.0"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"\frac{1}{2}"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("0, -3", "-3,0"),
        ("3000000", "3e6"),
        (r"3 \times 10^6", "3e6"),
        ("3e6", "3000000"),
        (r"\frac78", r"$\frac{7}{8}$"),
        ("84, 69", "$69$,$84$"),
        (r"The fraction is $\frac{7}{8}$.", r"\frac{7}{8}"),
        (r"$\frac{7}{8}$", r"\frac{7}{8}"),
    ],
)
def test_an_equal_final_answer_scores_one(given, answer):
    assert math_reward(f"thinking\n#### {given}", answer) == 1.0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("25", "24"),
        ("2.4", "24"),
        ("-24", "24"),
        ("24 or 25", "24"),
        ("25 24", "24"),
        ("25 24", "49"),
        ("24, 25", "24"),
        ("12 * 2", "24"),
        ("20+4", "24"),
        (r"12 \times 2", "24"),
        ("48/2", "24"),
        ("12 * 2 = 25", "24"),
        ("24 = 25", "24"),
        ("twenty four", "24"),
        ("?", "24"),
        ("5/0", "24"),
        (r"\frac{", "24"),
        ("(3, 1)", r"\left( 3, \frac{\pi}{2} \right)"),
    ],
)
def test_any_other_final_answer_scores_zero(given, answer):
    assert math_reward(f"24 24 thinking\n#### {given}", answer) == 0.0


@pytest.mark.parametrize("text", ["5 + 7 = 12. So 12.", "Is 12 the answer?", "12", "#### 13\nI mean 12"])
def test_the_right_number_without_a_final_answer_scores_zero(text):
    assert math_reward(text, "12") == 0.0


def test_the_final_answer_template_is_read_back():
    assert final_answer("so\n" + FINAL_ANSWER.format(answer="1,234")) == "1,234"


def test_importing_rewards_does_not_import_torch():
    code = "import sys, trapo.rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------------- the pool


@pytest.fixture(scope="module")
def pool():
    with RewardPool(MISBEHAVE, workers=2, timeout=1.5) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _fresh_counts(request):
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool").counts.clear()


def statuses(rewards):
    return [(r.value, r.status) for r in rewards]


OK = (1.0, "ok")


def test_the_pool_grades_math_in_order_and_counts():
    with RewardPool("math", workers=2) as pool:
        pairs = [(f"#### {i}", str(i if i % 3 else i + 1)) for i in range(60)]
        assert [r.value for r in pool.score(pairs)] == [float(i % 3 > 0) for i in range(60)]
        assert pool.counts == {"ok": 60}
        assert pool.score([]) == []


def test_the_default_pool_survives_a_text_that_sympy_would_compute_forever():
    with RewardPool("math", workers=1, timeout=1.0, memory_gib=1.0) as pool:
        bad, good = pool.score([("#### 9^{9^{9^{9}}} !", "x"), ("#### 4", "4")])
        assert bad.value == 0.0
        assert good == Reward(1.0, "ok")


@pytest.mark.parametrize("text", ["hang", "spin", "spin in C"])
def test_a_hanging_item_is_cut_off_and_alone_scores_zero(pool, text):
    started = time.monotonic()
    rewards = pool.score([("a", "a"), (text, "a"), *[("a", "a")] * 20])
    assert statuses(rewards) == [OK, (0.0, "timeout"), *[OK] * 20]
    assert "1.5 s" in rewards[1].detail
    assert pool.counts == {"ok": 21, "timeout": 1}
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("text", ["exit", "segfault", "kill"])
def test_a_crashing_item_alone_scores_zero(pool, text):
    rewards = pool.score([*[("a", "a")] * 5, (text, "a"), *[("a", "a")] * 5])
    assert statuses(rewards) == [*[OK] * 5, (0.0, "crash"), *[OK] * 5]
    assert pool.counts == {"ok": 10, "crash": 1}


def test_a_worker_that_leaves_with_exit_code_zero_scores_zero(pool):
    rewards = pool.score([("a", "a"), ("exit 0", "a"), ("a", "a")])
    assert statuses(rewards) == [OK, (0.0, "crash"), OK]
    assert "exit code 0" in rewards[1].detail


def test_more_bad_items_than_workers_do_not_exhaust_the_pool(pool):
    rewards = pool.score([("hang", ""), ("exit", ""), ("kill", ""), ("hang", ""), ("a", "a")])
    assert [r.value for r in rewards] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert pool.counts["ok"] == 1
    assert pool.counts.total() == 5


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("raise", "KeyError: 'no such\\nthing'"),
        ("raise unpicklable", "Unpicklable: two numbers"),
        ("sys.exit", "SystemExit: 7"),
        ("raise unprintable", "Unprintable: (its __str__ fails)"),
        ("nan", f"{MISBEHAVE} must return a finite number; got nan"),
        ("inf", f"{MISBEHAVE} must return a finite number; got inf"),
        ("none", f"{MISBEHAVE} must return a finite number; got None"),
        ("string", f"{MISBEHAVE} must return a finite number; got '1.0'"),
        ("memory", "MemoryError:"),
    ],
)
def test_a_raising_or_wrongly_returning_function_is_an_error_with_its_reason(pool, text, detail):
    assert pool.score([("a", "a"), (text, "a")]) == [Reward(1.0, "ok"), Reward(0.0, "error", detail)]
    assert pool.counts == {"ok": 1, "error": 1}


def test_other_kinds_of_numbers_become_floats(pool):
    rewards = pool.score([("true", ""), ("int", "")])
    assert [(type(r.value), r.value) for r in rewards] == [(float, 1.0), (float, 2.0)]


def test_workers_do_not_import_torch(pool):
    assert pool.score([("torch", "")]) == [Reward(0.0, "ok")]


def test_an_idle_worker_that_is_killed_between_calls_costs_nothing(pool):
    os.kill(int(pool.score([("pid", "")])[0].value), signal.SIGKILL)
    time.sleep(0.5)
    assert statuses(pool.score([("a", "a")] * 4)) == [OK] * 4


def test_time_in_the_queue_does_not_count_against_an_item(pool):
    assert statuses(pool.score([("slow", "slow")] * 12)) == [OK] * 12


def test_a_pool_works_again_after_close():
    pool = RewardPool(MISBEHAVE, workers=1)
    assert statuses(pool.score([("a", "a")])) == [OK]
    pool.close()
    assert statuses(pool.score([("a", "a")])) == [OK]
    pool.close()


def test_busy_workers_end_when_the_trainer_is_killed(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        from trapo.rewards import RewardPool
        if __name__ == "__main__":
            with RewardPool({MISBEHAVE!r}, workers=2, timeout=100) as pool:
                print(*(int(r.value) for r in pool.score([("pid", "")] * 2)), flush=True)
                pool.score([("hang", "")] * 2)
        """)
    )
    env = {**os.environ, "PYTHONPATH": HERE}
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env)
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/status") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}/status") for pid in pids)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        ("maths", "must be 'math' or 'package.module:function'; got 'maths'"),
        ("no.such:thing", "reward 'no.such:thing' cannot be imported: ModuleNotFoundError"),
        ("reward_fixtures:missing", "cannot be imported: AttributeError"),
        ("reward_fixtures:NOT_A_FUNCTION", "is a int, not a function"),
    ],
)
def test_a_wrong_function_name_is_refused_at_once_and_in_one_line(fn, message):
    with pytest.raises(ValueError, match=message) as caught:
        RewardPool(fn)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0}, {"timeout": float("inf")}])
def test_impossible_pool_options_are_refused(options):
    with pytest.raises(ValueError, match="RewardPool"):
        RewardPool("math", **options)
