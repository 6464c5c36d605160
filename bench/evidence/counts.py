"""Bytes moved by each provider's kernels at one small shape, and the invariants that ours must keep.

Run as a module under TRITON_INTERPRET=1, it prints JSON: `traffic` rows and `memory` rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import trapo_kernels as tk

from . import memory, peers
from .roofline import SHAPES
from .traffic import Traffic, counted

__all__ = ["memory_rows", "traffic_rows"]

# fp32, since the interpreter's bf16 products are garbage (CCE's backward takes no fp32: fp16). A unit is N·V·itemsize,
# so the type does not matter.
ROWS, WIDTH, VOCAB = 48, 64, 3_000

# Shapes at which whole tiles of CCE fit.
CCE = (256, 64, 1_024)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    out = tk.linear_policy_loss(
        hidden, weight, targets, tk.Objective.trapo(entropy_coef=0.001), backend="triton",
        advantages=torch.ones_like(targets, dtype=torch.float32),
    )  # fmt: skip
    out.loss.backward()


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    out = tk.linear_logprobs(hidden, weight, targets, entropy=True, backend="triton")
    (out.logprobs.sum() + out.entropy.sum()).backward()


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        tk.linear_logprobs(hidden, weight, targets, entropy=True, backend="triton")


OURS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "policy loss": _loss,
    "logprobs, forward and recomputing backward": _logprobs,
    "logprobs, forward only": _forward,
}


def count(
    step: Callable[[Tensor, Tensor, Tensor], Any], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> Traffic:
    n, d, v = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=generator)
    with counted() as traffic:
        step(hidden, weight, targets)
    return traffic


def _rows(provider: str, path: str, step: Any, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    n, d, v = shape
    dtype = torch.float16 if provider == "cut_cross_entropy" else torch.float32
    traffic = count(step, shape, dtype)
    unit = n * v * dtype.itemsize
    return [
        {
            "provider": provider,
            "path": path,
            "shape": {"N": n, "D": d, "V": v},
            "kernel": kernel,
            "read": round(traffic.of("read", kernel=kernel) / unit, 4),
            "written": round(traffic.of("written", kernel=kernel) / unit, 4),
            "atomic": round(traffic.of("atomic", kernel=kernel) / unit, 4),
            "arguments": {
                f"{argument} {kind}": count
                for (name, argument, kind), count in sorted(traffic.bytes.items())
                if name == kernel and count >= unit // 100
            },
        }
        for kernel in traffic.kernels
    ]


def _log1p(x: Any) -> Any:
    """Stands in for libdevice's, which CCE calls, for an interpreter that has none: counts do not depend on its last
    digits."""
    import triton.language as tl

    return tl.log(1.0 + x)


def traffic_rows(providers: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of everybody who is installed, at one shape (CCE's fixed tiles need a larger one: ours are there
    too)."""
    from triton.language.extra import libdevice

    shape = (ROWS, WIDTH, VOCAB)
    rows = [row for path, step in OURS.items() for row in _rows("trapo_kernels", path, step, shape)]
    with mock.patch.object(libdevice, "log1p", _log1p):
        for provider in providers:
            at = CCE if provider == "cut_cross_entropy" else shape
            for path, step in peers.steps(provider).items():
                rows += _rows(provider, path, step, at)
    if "cut_cross_entropy" in providers:
        for path, step in OURS.items():
            rows += _rows("trapo_kernels", path, step, CCE)
    return rows


def memory_rows(providers: list[str]) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        peaks = {name: memory.peak(step, shape) for name, step in memory.steps(providers).items()}
        if "liger_kernel" in providers:
            peaks["liger_kernel, fused linear CE (formula)"] = memory.liger_bytes(shape)
        at = dict(zip("NDV", shape, strict=True))
        rows += [{"provider": name, "shape": at, "peak_bytes": peak} for name, peak in peaks.items()]
    return rows


def main() -> None:
    providers = json.loads(sys.argv[1])
    print(json.dumps({"traffic": traffic_rows(providers), "memory": memory_rows(providers)}))


if __name__ == "__main__":
    main()
