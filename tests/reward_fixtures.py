"""Reward functions that misbehave, by name, for the tests of RewardPool. The text says what to do."""

import ctypes
import os
import signal
import subprocess
import sys
import time

NOT_A_FUNCTION = 3


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("two numbers")
        self.handle = open(os.devnull)  # noqa: SIM115


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def leave_behind(text: str, answer: str) -> float:
    """Starts a child as the text says, notes its id in the file `answer`, then hangs, crashes or returns."""
    how, _, then = text.partition(" then ")
    if how == "subprocess":
        child = subprocess.Popen(["sleep", "600"]).pid
    elif how == "session":
        child = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
    else:
        child = os.fork()
        if child == 0:
            time.sleep(600)
    with open(answer, "a") as file:
        file.write(f"{child}\n")
    if then == "hang":
        time.sleep(1000)
    if then == "crash":
        os._exit(1)
    return 1.0


def forks_and_returns(text: str, answer: str) -> float:
    """A child that comes back from the function as its parent does."""
    return float(os.fork() >= 0)


def prints(text: str, answer: str) -> float:
    print("x" * 3_000_000, flush=True)
    return 1.0


def dies_once(text: str, answer: str) -> float:
    """Killed, as for want of memory, at the first try of each answer; `answer` is a file that remembers."""
    if not os.path.exists(answer):
        open(answer, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def sleeps(text: str, answer: str) -> float:
    time.sleep(float(text))
    return 1.0


def fails(text: str, answer: str) -> float:
    raise KeyError("api_key missing")


def fails_for_odd_length(text: str, answer: str) -> float:
    if len(text) % 2:
        raise KeyError("odd one")
    return 1.0


def five(text: str, answer: str) -> float:
    return 5.0


def misbehave(text: str, answer: str) -> float:
    if text == "hang":
        time.sleep(1000)
    if text == "spin":
        while True:
            pass
    if text == "spin in C":  # holds the interpreter lock: no signal handler of Python's ever runs
        sum(range(10**13))
    if text in ("exit", "exit 0", "segfault", "kill", "slow"):
        time.sleep(0.4)
    if text == "exit":
        os._exit(3)
    if text == "exit 0":
        os._exit(0)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "sys.exit":
        sys.exit(7)
    if text == "raise":
        raise KeyError("no such\nthing")
    if text == "raise unpicklable":
        raise Unpicklable(1, 2)
    if text == "raise unprintable":
        raise Unprintable
    if text == "memory":
        return float(len(bytearray(8 * 2**30)))
    if text == "pid":
        return float(os.getpid())
    if text == "torch":
        return float("torch" in sys.modules)
    odd = {"nan": float("nan"), "inf": float("inf"), "none": None, "string": "1.0", "true": True, "int": 2}
    if text in odd:
        return odd[text]  # type: ignore[return-value]
    return 1.0 if text == answer else 0.0


def by_length(text: str, answer: str) -> float:
    return len(text) % 7 / 7


def too_large(logprobs, advantages):
    """A policy term that float32 cannot hold."""
    return -1e39 * advantages * logprobs


def hang_on_odd_length(text: str, answer: str) -> float:
    if len(text) % 2:
        time.sleep(1000)
    return 1.0
