"""This folder says what each mode is: a guidance schedule and an objective, run by the same loop.

A mode is one function with `@mode("what it does, in a sentence")` above it; that line puts it into MODES, from which
the key `mode`, `trapo config` and the documentation have it. Sources are named in trapo_kernels.Objective's presets.
"""

from __future__ import annotations

from trapo.modes import basic, distilling, hybrids, learnt_mix, two_levels
from trapo.modes.phase import Course, Phase, cut_at_plateau, phase_at
from trapo.modes.registry import MODES, Mode, check_mode, mode, phases

__all__ = [
    "MODES",
    "Course",
    "Mode",
    "Phase",
    "basic",
    "check_mode",
    "cut_at_plateau",
    "distilling",
    "hybrids",
    "learnt_mix",
    "mode",
    "phase_at",
    "phases",
    "two_levels",
]
