"""Stage: the conformance suite on the device, `pytest --device`; a row for each test that fails, and one that counts.

It is its own plugin: `pytest -p bench.gpu.suite`, with the rows' file in an environment variable, so that the processes
of pytest-xdist report through the one that started them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu.rows import Rows, options
from bench.gpu.running import ROOT

__all__ = ["main"]

_ROWS = "TRAPO_GPU_SUITE_ROWS"
_EVERY = 200  # tests between two rows that count

# The most telling first; a name that is not there yet is left out.
TESTS = (
    *("conformance", "columns", "divergence", "terms", "stream", "capture", "autograd", "own_terms", "statistics"),
    *("vocab_parallel", "compile", "hostile_numbers", "terms_on_backends", "terms_of_sequences"),
)
# On a CPU the suite has its own place in CI: here a few tests, to try the stage.
FEW = "torch and (test_every_preset or test_all_expert)"


def main(arguments: list[str] | None = None) -> int:
    chosen = options(__doc__, arguments, workers={"type": int, "default": min(8, os.cpu_count() or 1)})
    on_gpu = chosen.device == "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.suite", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in (TESTS if on_gpu else TESTS[:1])]
    command += ["--device", chosen.device, *(file for file in files if (ROOT / file).exists())]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(chosen.workers if on_gpu else 0)]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    command += ["--maxfail", "60"] if on_gpu else ["-k", FEW]
    environment = {**os.environ, _ROWS: str(chosen.rows)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


class _Reporter:
    """What pytest calls."""

    def __init__(self, path: Path) -> None:
        self.rows = Rows(path)
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.rows.add(what="failed", test=report.nodeid, why=lines[0][1:].strip()[:300] if lines else "")
        if sum(self.counts.values()) % _EVERY == 0:
            self.rows.add(what="so far", **self.counts)

    def pytest_sessionfinish(self) -> None:
        self.rows.add(what="tests", **{name: self.counts[name] for name in ("passed", "failed", "skipped")})


def pytest_configure(config: Any) -> None:
    if _ROWS in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reporter(Path(os.environ[_ROWS])), "trapo-gpu-rows")


if __name__ == "__main__":
    sys.exit(main())
