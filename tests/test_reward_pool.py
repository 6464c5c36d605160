"""What the reward workers leave behind (nothing), and what costs no innocent answer anything."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from trapo.rewards import Reward, RewardPool
from trapo.rewards import pool as pool_module

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # workers get the path of this process, and import reward_fixtures by name
    sys.path.insert(0, HERE)


def gone(pids, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="families are found by /proc")
@pytest.mark.parametrize("how", ["subprocess", "session", "fork"])
@pytest.mark.parametrize("then", ["hang", "return"])
def test_what_a_function_starts_ends_with_its_worker(tmp_path, how, then):
    file = tmp_path / "pids"
    with RewardPool("reward_fixtures:leave_behind", workers=1, timeout=1.0) as pool:
        (reward,) = pool.score([(f"{how} then {then}", str(file))])
        assert reward.status == ("timeout" if then == "hang" else "ok")
        pids = [int(line) for line in file.read_text().split()]
        assert pids
        assert then == "return" or gone(pids)
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="families are found by /proc")
def test_what_a_crashed_worker_started_ends_too(tmp_path):
    file = tmp_path / "pids"
    with RewardPool("reward_fixtures:leave_behind", workers=1) as pool:
        (reward,) = pool.score([("subprocess then crash", str(file))])
    assert reward.status == "crash"
    assert gone([int(line) for line in file.read_text().split()])


def test_a_child_that_returns_from_the_function_answers_nothing():
    with RewardPool("reward_fixtures:forks_and_returns", workers=1) as pool:
        assert pool.score([("", "")] * 5) == [Reward(1.0, "ok")] * 5


def test_what_a_function_prints_does_not_reach_the_trainers_output(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from trapo.rewards import RewardPool
        if __name__ == "__main__":
            with RewardPool("reward_fixtures:prints", workers=1) as pool:
                print(pool.score([("", "")])[0].status)
        """)
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == "ok\n"


def test_an_answer_whose_worker_was_killed_from_outside_has_a_second_try(tmp_path):
    with RewardPool("reward_fixtures:dies_once", workers=2) as pool:
        assert pool.score([("", str(tmp_path / name)) for name in "abc"]) == [Reward(1.0, "ok")] * 3


def test_a_suspended_worker_is_resumed_and_its_answer_judged_anew():
    with RewardPool("reward_fixtures:sleeps", workers=1, timeout=2.0) as pool:
        pid = pool._crew[0].process.pid
        threading.Timer(0.2, os.kill, (pid, signal.SIGSTOP)).start()
        assert pool.score([("1.0", "")]) == [Reward(1.0, "ok")]


def test_time_in_which_this_process_was_suspended_does_not_count(monkeypatch):
    now = time.monotonic()
    jumps = iter([0.0, 100.0, 100.1, 100.2])
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now + next(jumps))
    clock = pool_module._Clock()
    assert clock.spent() <= 1.0
    assert clock.spent() - clock.spent() == pytest.approx(-0.1)


def test_no_step_of_the_wall_clock_ends_an_answer(monkeypatch):
    real = time.time
    with RewardPool("reward_fixtures:sleeps", workers=1, timeout=3.0) as pool:
        monkeypatch.setattr(time, "time", lambda: real() + 3600)
        assert pool.score([("0.5", "")]) == [Reward(1.0, "ok")]


def test_an_interrupted_call_leaves_no_answer_for_the_next_one(monkeypatch):
    with RewardPool("reward_fixtures:misbehave", workers=1) as pool:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.score([("hang", "")])
        assert pool.score([("a", "a"), ("b", "a")]) == [Reward(1.0, "ok"), Reward(0.0, "ok")]


def test_rewards_are_scaled_from_their_bounds_and_refused_outside():
    with RewardPool("reward_fixtures:five", workers=1, bounds=(-5.0, 15.0)) as pool:
        assert pool.score([("", "")]) == [Reward(0.5, "ok")]
    with RewardPool("reward_fixtures:five", workers=1, bounds=(0.0, 1.0)) as pool:
        (reward,) = pool.score([("", "")])
    assert reward == Reward(0.0, "error", "reward_fixtures:five returned 5, outside reward.range [0, 1]")
    with RewardPool("reward_fixtures:five", workers=1, bounds=(-5.0, 4.999999)) as pool:
        assert pool.score([("", "")]) == [Reward(1.0, "ok")]
    with pytest.raises(ValueError, match="bounds must be two finite numbers, the lower one first"):
        RewardPool("math", bounds=(1.0, 0.0))
