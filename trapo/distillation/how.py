"""This file says how a phase distils: from whom, and by which divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trapo.modes.phase import Phase
    from trapo.settings.groups import ModelConfig

CURRENT, INITIAL, COLUMNS = "current", "initial", "columns"
TEMPLATE = (
    "{prompt}\n\nThis is a solution that is known to be right:\n\n{trace}\n\n"
    "Read it until you see why each step holds. Then solve the problem yourself, in your own words."
)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Holds the keys of the group `distill`, with a mode's choices in place of null."""

    teacher: str  # current or initial: the model itself, with a trace; columns; http://host:port; or a model's path
    kind: str
    beta: float = 0.5
    coef: float = 1.0
    tail: str = "bucket"
    top_k: int = 20
    dtype: str | None = None
    template: str = TEMPLATE
    check_every: int = 10

    @property
    def privileged(self) -> bool:
        """Returns whether the teacher is the model itself, which reads an expert trace."""
        return self.teacher in (CURRENT, INITIAL)

    @property
    def served(self) -> bool:
        """Returns whether a server is the teacher."""
        return self.teacher.startswith(("http://", "https://"))

    @property
    def top(self) -> bool:
        """Returns whether the teacher is known on some ids of each token alone."""
        return self.served or self.teacher == COLUMNS

    @property
    def weights(self) -> str | None:
        """Returns the path of the teacher's own weights; None where they are the run's, or somebody else's matter."""
        return None if self.top or self.privileged else self.teacher

    def own_model(self, student: ModelConfig) -> ModelConfig | None:
        """Returns the frozen model that is held beside the student; None: there is none."""
        if self.top or self.teacher == CURRENT:
            return None
        path = student.path if self.teacher == INITIAL else self.teacher
        dtype = self.dtype or student.dtype
        return dataclasses.replace(student, path=path, dtype=dtype, freeze=None, gradient_checkpointing=False)


def teacher_of(student: ModelConfig, phases: Iterable[Phase]) -> ModelConfig | None:
    """Returns the `own_model` of a run's teacher; None: no phase has one."""
    found = (phase.distills.own_model(student) for phase in phases if phase.distills is not None)
    return next((own for own in found if own is not None), None)
