"""Reward functions that misbehave, by name, for the tests of RewardPool. The text says what to do."""

import ctypes
import os
import signal
import sys
import time

NOT_A_FUNCTION = 3


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__("two numbers")
        self.handle = open(os.devnull)  # noqa: SIM115


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


def astronomical(text: str, answer: str) -> float:
    return 1e39 * (1 + len(text))


def hang_on_odd_length(text: str, answer: str) -> float:
    if len(text) % 2:
        time.sleep(1000)
    return 1.0
