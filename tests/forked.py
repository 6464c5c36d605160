"""Commands in processes of their own that need not import torch once more, which takes longer than most of them: a
server, one for each process of pytest, has imported what they need, and forks for each. It used no thread, no kernel.

As a script it is that server: a line of JSON in, one out.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Command:
    """A call of `function` ("module:name") without arguments, as that of a program with `arguments` in sys.argv."""

    function: str
    arguments: Sequence[object]
    threads: int = 1
    cwd: str | os.PathLike | None = None
    environment: Mapping[str, object] = field(default_factory=dict)  # beside that of the caller


def run(*command: object, timeout: int = 300, **options: object) -> subprocess.CompletedProcess:
    """What a Command of these fields wrote, and its exit status."""
    return run_together([Command(*command, **options)], timeout)[0]  # type: ignore[arg-type]


def run_together(commands: Sequence[Command], timeout: int = 300) -> list[subprocess.CompletedProcess]:
    """The same of several that run at once."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            asdict(command)
            | {
                "arguments": [str(argument) for argument in command.arguments],
                "cwd": os.fspath(command.cwd or os.getcwd()),
                "environment": os.environ | {name: str(value) for name, value in command.environment.items()},
                "files": [f"{folder}/{number}.out", f"{folder}/{number}.err"],
            }
            for number, command in enumerate(commands)
        ]
        codes = _server().ask(tasks, timeout)
        texts = [[Path(file).read_text() for file in task["files"]] for task in tasks]
    return [
        subprocess.CompletedProcess(task["arguments"], code, *text)
        for task, code, text in zip(tasks, codes, texts, strict=True)
    ]


class _Server:
    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # One thread: numpy's OpenBLAS starts its others when it is imported.
        one = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(command, start_new_session=True, env=one, **pipes)  # type: ignore[call-overload]
        atexit.register(self.stop)

    def ask(self, tasks: list[dict], timeout: int) -> list[int]:
        """Their exit statuses."""
        print(json.dumps(tasks), file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.stop()
            raise subprocess.TimeoutExpired([task["arguments"] for task in tasks], timeout)
        answer = self.process.stdout.readline()
        assert answer, "the server of tests/forked.py has ended"
        return json.loads(answer)

    def stop(self) -> None:
        """Its end; of what still runs, too."""
        _server.cache_clear()
        atexit.unregister(self.stop)
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()


def _serve() -> None:
    # No module of the tests: each command has those for itself, and may change them.
    for name in (
        "torch",
        "transformers",
        "safetensors.torch",
        "trapo.cli",
        "trapo.trainer",
        "trapo.report.write",
        "trapo.models.sharding",
    ):
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    for line in sys.stdin:
        children = []
        for task in json.loads(line):
            children.append(os.fork())
            if children[-1] == 0:
                _become(task)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def _become(task: Mapping) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(task["files"], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(task["environment"])
        os.chdir(task["cwd"])
        import torch

        torch.set_num_threads(task["threads"])
        module, name = task["function"].split(":")
        sys.argv = [name, *task["arguments"]]
        getattr(importlib.import_module(module), name)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
