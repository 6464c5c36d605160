"""The stages of a run, in order: what they run, how long each may take, and which may run side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["MINUTES", "SHAPES", "STAGES", "Stage", "command", "stages"]

MINUTES = 9.0  # of a run for which the limits below are made; a longer one stretches them

# (N, D, V): the shape of Liger's published H200 numbers, a 7B of Qwen's, an 8B of Llama's, a long batch of a small one
SHAPES = {
    "cuda": ("4096,4096,131072", "8192,3584,152064", "16384,4096,128256", "32768,2048,151936"),
    "cpu": ("128,16,300",),
}


@dataclass(frozen=True)
class Stage:
    """`python -m bench.gpu.<module>`; `limit` in seconds, on a GPU and on a CPU."""

    name: str
    module: str
    limit: tuple[float, float]
    beside: bool = False  # measures no time: may run beside its neighbours that do not either
    arguments: tuple[str, ...] = field(default=())


STAGES = (
    Stage("environment", "environment", (20, 60)),
    Stage("build", "build", (80, 60)),
    Stage("first call", "first_call", (30, 60)),
    Stage("smoke", "smoke", (90, 60), True),
    Stage("suite", "suite", (150, 120), True),
    Stage("sanitizer", "sanitizer", (140, 60), True),
    Stage("ceilings", "ceilings", (60, 60)),
    Stage("graphs", "graphs", (30, 60)),
    Stage("training step", "train_step", (45, 60)),
    Stage("trapo train", "trainer", (40, 120)),
)


def stages(device: str) -> list[Stage]:
    """Returns all of them; the losses, a stage a shape, follow the ceilings."""
    after = [s.name for s in STAGES].index("ceilings") + 1
    losses = [Stage(f"losses {shape}", "losses", (50, 120), arguments=("--shape", shape)) for shape in SHAPES[device]]
    return [*STAGES[:after], *losses, *STAGES[after:]]


def command(stage: Stage, device: str, rows: str) -> list[str]:
    return ["-m", f"bench.gpu.{stage.module}", "--device", device, "--rows", rows, *stage.arguments]
