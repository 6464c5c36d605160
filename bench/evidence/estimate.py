"""Milliseconds on an H200 by arithmetic: the phases of roofline.py at rates that are assumed, not published peaks.

    python -m bench.evidence.estimate

Estimates, to be replaced by `make gpu`; no clock saw any of them. The rates are those that large bf16 GEMMs and copies
are known to reach on such cards; a GEMM hides half of the traffic of adding to an fp32 d_weight, and what is done on
vectors takes `VECTOR` seconds a loss. `MEASURED` has what others measured of their own, and `checked` what this
arithmetic says there.
"""

from __future__ import annotations

from bench.evidence.roofline import APPROACHES, CARDS, SHAPES, Phase, phases_on

__all__ = ["BANDWIDTH", "FLOPS", "VECTOR", "checked", "milliseconds", "table"]

H200 = next(card for card in CARDS if card.name.startswith("H200"))
FLOPS, BANDWIDTH = 770e12, 4.3e12
# Terms, metrics, normalizers: launches on [N]. Some hundred of them would take this long.
VECTOR = {"trapo_kernels": 0.7e-3, "trapo_kernels, recomputing": 0.7e-3}
SHOWN = {name: run for name, run in APPROACHES.items() if name != "cut_cross_entropy, all filtered"}

# (approach, shape, ms): what others measured on an H200, in liger-kernel 0.8.5's fused_linear_cross_entropy_sm90.py.
MEASURED = (
    ("quack, base, no entropy", (4096, 4096, 128_256), 17.33),
    ("liger_kernel, Hopper, no entropy", (4096, 4096, 128_256), 18.06),
)


def _seconds(phase: Phase) -> float:
    if not phase.flops:
        return phase.bytes / BANDWIDTH
    gemm, memory = phase.flops / FLOPS, phase.bytes / BANDWIDTH
    if phase.name.startswith("d_weight"):
        return max(gemm + memory / 2, memory)
    return max(gemm, memory)


def milliseconds(approach: str, shape: tuple[int, int, int]) -> float:
    return 1e3 * (sum(map(_seconds, phases_on(approach, shape, H200))) + VECTOR.get(approach, 0.0))


def floor(shape: tuple[int, int, int]) -> float:
    """Returns the time of three GEMMs."""
    n, d, v = shape
    return 1e3 * 6.0 * n * d * v / FLOPS


def table() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        where = dict(zip("NDV", shape, strict=True))
        rows.append({"shape": where, "approach": "three GEMMs", "ms": floor(shape)})
        rows += [{"shape": where, "approach": name, "ms": milliseconds(name, shape)} for name in SHOWN]
    return rows


def checked() -> list[dict[str, object]]:
    """Returns the arithmetic beside what others measured."""
    return [
        {"approach": name, "shape": dict(zip("NDV", shape, strict=True)), "measured_ms": ms,
         "estimated_ms": milliseconds(name, shape)}
        for name, shape, ms in MEASURED
    ]  # fmt: skip


if __name__ == "__main__":
    for row in table():
        print(f"{row['shape']!s:42} {row['approach']:36} {row['ms']:7.1f} ms (estimated)")
    for row in checked():
        print(f"{row['shape']!s:42} {row['approach']:36} {row['estimated_ms']:7.1f} ms; measured {row['measured_ms']}")
