"""This folder lets a teacher's distributions be learnt: how (how.py), what a teacher says of tokens and the divergence
from that (known.py), who the teachers are (heads.py, listed.py, made by making.py), and how it goes (tutor.py)."""

from __future__ import annotations

from trapo.distillation.how import Distillation
from trapo.distillation.tutor import Tutor

__all__ = ["Distillation", "Tutor"]
