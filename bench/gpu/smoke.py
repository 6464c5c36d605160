"""Stage: the cases of `tk.verify` in this process, a row each: what the sanitizers look at, and a first word on each
backend."""

from __future__ import annotations

import sys
import time

import torch

import trapo_kernels as tk
from bench.gpu.rows import Rows, one_line, options, settle
from trapo_kernels.verify.cases import CASES, Case, fault

__all__ = ["main"]

# Under a sanitizer a case takes a hundred times as long: of 16 bits, one block and a cluster of them.
_TINY = 60_000


def chosen_cases(device: str, tiny: bool) -> list[Case]:
    if device == "cpu":
        return [case for case in CASES if case.vocab <= 300 and case.rows < 100]
    return [case for case in CASES if not tiny or (case.dtype == "bfloat16" and case.vocab <= _TINY and case.rows < 10)]


def main(arguments: list[str] | None = None) -> int:
    chosen = options(
        __doc__, arguments,
        backend={"help": "default: every compiled one that is here"}, tiny={"action": "store_true"},
    )  # fmt: skip
    rows, wrong = Rows(chosen.rows), 0
    names = [b.name for b in tk.backends().values() if b.compiled and b.available]
    names = [n for n in names if tk.backends()[n].device in (None, chosen.device)]
    for name in [chosen.backend] if chosen.backend else names:
        right = 0
        for case in chosen_cases(chosen.device, chosen.tiny):
            start = time.perf_counter()
            try:
                reason = fault(case, name, torch.device(chosen.device))
                settle(chosen.device)
            except Exception as error:
                reason = one_line(error)
            right += reason is None
            if reason is not None:
                wrong += 1
                seconds = round(time.perf_counter() - start, 3)
                rows.add(what="wrong", backend=name, case=case.name, why=reason, seconds=seconds)
        rows.add(what="smoke", backend=name, right=right, of=len(chosen_cases(chosen.device, chosen.tiny)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
