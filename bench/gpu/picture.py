"""A run's plot: each provider's time over that of the three bare GEMMs, by shape."""

from __future__ import annotations

from pathlib import Path

from bench.gpu.losses import BOTH
from bench.gpu.page import FLOOR
from bench.gpu.results import Results

__all__ = ["draw"]


def draw(results: Results, path: Path) -> str | None:
    """Writes the plot; why not, or None."""
    try:
        import matplotlib
    except ImportError as error:
        return str(error)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results.rows("loss") if r["part"] == BOTH and "ms" in r]
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    floor = {tuple(r["shape"]): r["ms"] for r in rows if r["provider"] == FLOOR}
    shapes = [shape for shape in shapes if shape in floor]
    if not shapes:
        return "no shape has its bare GEMMs"
    height = 1.2 + 0.3 * max(sum(tuple(r["shape"]) == s for r in rows) for s in shapes)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(5.5 * len(shapes), height), squeeze=False, layout="constrained", facecolor="white"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        mine = [r for r in rows if tuple(r["shape"]) == shape and r["provider"] != FLOOR]
        mine.sort(key=lambda r: -r["ms"])
        colors = ["C0" if r["provider"].startswith("trapo_kernels") else "0.6" for r in mine]
        bars = axis.barh(
            [f"{r['provider']} ({r['gives']})" for r in mine], [r["ms"] / floor[shape] for r in mine], color=colors
        )
        axis.bar_label(bars, labels=[f"{r['ms']:.1f} ms" for r in mine], padding=3, fontsize=8)
        axis.axvline(1.0, color="C3", linewidth=1)
        axis.set(title="N={} D={} V={}".format(*shape), xlabel="time / three bare GEMMs")
        axis.margins(x=0.2)
    figure.suptitle(f"{results.data['card']}: forward and both gradients")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return None
