"""Drawing responses to held-out problems and scoring them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from study.engine import StudyEngine
from study.task import EOS, PAD, Instance, Task, decode, encode
from trapo.engines.protocol import Completion, Request
from trapo.evaluation.stats import pass_at_k


@dataclasses.dataclass(frozen=True)
class Samples:
    """right [problems, samples] bool, and how long and how often finished the responses were."""

    right: np.ndarray
    finished: float
    mean_tokens: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def pass_at(self, k: int) -> float:
        """Returns mean over problems of the unbiased estimate of pass@k."""
        n = self.right.shape[1]
        return float(np.mean([pass_at_k(n, int(c), k) for c in self.right.sum(1)]))

    def only(self, chosen: Sequence[bool]) -> Samples:
        return dataclasses.replace(self, right=self.right[np.asarray(chosen)])


def is_right(task: Task, instance_prompt: str, answer: str, completion_ids: Sequence[int], finished: bool) -> bool:
    """Returns the reward of a response; one that did not end by itself earns none."""
    return finished and task.is_right(instance_prompt, answer, decode(completion_ids))


def sample_problems(
    model: nn.Module, task: Task, instances: Sequence[Instance], *, samples: int, temperature: float, seed: int
) -> Samples:
    """Draws `samples` responses to each problem, and grades them."""
    completions = draw(model, task, instances, samples=samples, temperature=temperature, seed=seed)
    return graded(task, instances, completions, samples)


def draw(
    model: nn.Module, task: Task, instances: Sequence[Instance], *, samples: int, temperature: float, seed: int
) -> list[Completion]:
    """Returns `samples` responses to each problem, a problem's side by side."""
    engine = StudyEngine(model, eos_id=EOS, pad_id=PAD)
    requests = [Request(encode(i.prompt), task.max_response) for i in instances for _ in range(samples)]
    return engine.generate(requests, temperature=temperature, seed=seed)


def graded(task: Task, instances: Sequence[Instance], completions: Sequence[Completion], samples: int) -> Samples:
    """Returns which of `draw`'s responses are right."""
    asked = [i for i in instances for _ in range(samples)]
    right = [
        is_right(task, i.prompt, i.answer, c.token_ids, c.finished) for i, c in zip(asked, completions, strict=True)
    ]
    return Samples(
        np.array(right).reshape(len(instances), samples),
        finished=float(np.mean([c.finished for c in completions])),
        mean_tokens=float(np.mean([len(c.token_ids) for c in completions])),
    )


def packed(right: np.ndarray) -> str:
    """Returns a bool per problem as hexadecimal digits, for results files."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """Returns what `packed` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:count].astype(bool)
