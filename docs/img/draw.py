"""Draws the site's pictures: `python docs/img/draw.py`. They take their colours from the page, light or dark."""

from __future__ import annotations

import math
from pathlib import Path

HERE = Path(__file__).parent
ACCENT, SECOND = "#e8710a", "#1a8a7d"  # readable on white and on black
STYLE = 'font-family="inherit" font-size="13" stroke="none"'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    # No blank line: Markdown would end the HTML block there.
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg" '
        f'style="max-width:{width}px;width:100%;height:auto;color:inherit">\n<title>{title}</title>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, anchor: str = "start", color: str = "currentColor", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}" {STYLE}{weight}>{words}</text>'


def box(x: float, y: float, w: float, h: float, color: str = "currentColor", fill: float = 0.08) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{color}" fill-opacity="{fill}" '
        f'stroke="{color}" stroke-width="1.2"/>'
    )


def line(points: list[tuple[float, float]], color: str = "currentColor", width: float = 2, dash: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashed}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str = "currentColor") -> str:
    angle = math.atan2(y2 - y1, x2 - x1)
    tip = [(x2 - 7 * math.cos(angle + d), y2 - 7 * math.sin(angle + d)) for d in (-0.45, 0.45)]
    head = f'<polygon points="{x2:g},{y2:g} {tip[0][0]:.1f},{tip[0][1]:.1f} {tip[1][0]:.1f},{tip[1][1]:.1f}"'
    return line([(x1, y1), (x2, y2)], color, 1.4) + f'{head} fill="{color}"/>'


def chunks() -> str:
    """The chunk loop: what is held, what is multiplied."""
    p = [
        text(8, 18, "hidden states [N, D]", bold=True),
        box(8, 28, 60, 200),
        box(8, 88, 60, 36, ACCENT, 0.35),
        text(76, 110, "C rows", color=ACCENT),
        text(170, 18, "one buffer [C, V], reused", bold=True),
        box(170, 28, 330, 36, ACCENT, 0.35),
        text(335, 51, "logits, then their gradient, in place", "middle"),
        arrow(68, 96, 166, 50, ACCENT),
        text(100, 62, "① · Wᵀ", color=ACCENT),
        text(170, 96, "row kernel: max, Σe, Σe·z → log π(y), entropy"),
        text(170, 116, "terms: loss, ∂/∂logp, ∂/∂H: vectors of length C"),
        text(170, 136, "row kernel: g_lp(1[j=y] − π) − g_H π(log π + H)"),
        arrow(335, 146, 230, 188, SECOND),
        arrow(335, 146, 430, 188, SECOND),
        text(240, 162, "② · W", "end", color=SECOND),
        text(430, 162, "③ ᵀ · hidden", color=SECOND),
        box(170, 192, 110, 36, SECOND, 0.2),
        text(225, 215, "d hidden, C rows", "middle"),
        box(370, 192, 130, 36, SECOND, 0.2),
        text(435, 215, "d W [V, D], added up", "middle"),
        text(8, 256, "dashed: what a plain implementation holds, several times over: [N, V]"),
        '<rect x="520" y="28" width="150" height="200" rx="3" fill="none" stroke="currentColor" '
        'stroke-width="1.2" stroke-dasharray="5 4"/>',
        text(595, 132, "all logits", "middle"),
    ]
    return svg(690, 266, "The chunk loop: three matrix products and one buffer of C rows of logits", p)


def trust_region() -> str:
    """Loss and slope of SFT and TrSFT against the probability of the expert's token."""
    alpha, parts = 0.1, []

    def panel(left: float, title: str, top: float, curves: dict[str, tuple[str, list[tuple[float, float]]]]) -> None:
        w, h, base = 280, 170, 214

        def place(p: float, value: float) -> tuple[float, float]:
            return left + p * w, base - min(value, top) / top * h

        parts.append(text(left, 24, title, bold=True))
        parts.append(line([(left, base - h), (left, base), (left + w, base)], width=1.2))
        for p in (0.0, alpha, 0.5, 1.0):
            label = "α = 0.1" if p == alpha else f"{p:g}"
            parts.append(text(left + p * w - 4 * (p == alpha), base + 18, label, "start" if p == alpha else "middle"))
        parts.append(text(left + w / 2, base + 38, "probability p of the expert's token", "middle"))
        parts.append(line([place(alpha, 0), place(alpha, top)], width=1, dash="3 4"))
        for step in range(1, int(top) + 1, max(1, int(top) // 4)):
            parts.append(text(left - 6, place(0, step)[1] + 4, f"{step}", "end"))
        for name, (color, points) in curves.items():
            visible = [(p, v) for p, v in points if v <= top]
            parts.append(line([place(p, v) for p, v in visible], color, 2.4))
            x, y = place(*visible[len(visible) * 2 // 5])
            parts.append(text(x + 10, y - 8, name, color=color, bold=True))

    grid = [i / 400 for i in range(1, 401)]
    panel(40, "loss, nats", 5, {
        "SFT: −log p": (SECOND, [(p, -math.log(p)) for p in grid]),
        "": (ACCENT, [(p, 1 - math.log(alpha) - p / alpha if p < alpha else -math.log(p)) for p in grid]),
    })  # fmt: skip
    panel(390, "slope: how hard log p is pushed up", 1.25, {
        "SFT: 1": (SECOND, [(p, 1.0) for p in grid]),
        "": (ACCENT, [(p, min(1.0, p / alpha)) for p in grid]),
    })  # fmt: skip
    parts.append(text(72, 70, "TrSFT", color=ACCENT, bold=True))
    parts.append(text(424, 150, "TrSFT: p/α below α, then 1", color=ACCENT, bold=True))
    return svg(690, 262, "Loss and slope of SFT and of TrSFT", parts)


def micro_groups() -> str:
    """One prompt's eight rollouts."""
    below = "guided while mean &lt; "
    groups = [(4, 0.0, "never guided"), (2, 0.2, below + "0.5"), (1, 0.5, below + "0.7"), (1, 1.0, below + "0.9")]
    parts, y = [text(8, 20, "one prompt, eight rollouts, drawn in four micro-groups", bold=True)], 34
    for size, ratio, condition in groups:
        top = y
        for _ in range(size):
            if ratio:
                parts.append(box(150, y, 300 * ratio, 14, ACCENT, 0.45))
            if ratio < 1:
                parts.append(box(150 + 300 * ratio, y, 300 * (1 - ratio), 14, SECOND, 0.25))
            y += 19
        label = f"{ratio:.0%} of the trace" if ratio else "no prefix"
        parts.append(text(140, (top + y) / 2 + 2, label, "end"))
        parts.append(text(462, (top + y) / 2 + 2, condition))
        y += 8
    parts.append(box(150, y + 6, 14, 14, ACCENT, 0.45) + text(170, y + 18, "expert tokens: TrSFT"))
    parts.append(box(330, y + 6, 14, 14, SECOND, 0.25) + text(350, y + 18, "own tokens: policy gradient"))
    return svg(690, y + 30, "Micro-groups of rollouts with growing expert prefixes", parts)


if __name__ == "__main__":
    for name, draw in (("chunks", chunks), ("trust-region", trust_region), ("micro-groups", micro_groups)):
        (HERE / f"{name}.svg").write_text(draw())
