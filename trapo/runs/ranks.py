"""This file says which part of the work is this process's, and what travels between processes (started by torchrun).

Every rank runs the same program over the same problems and knows all rollouts of a step. Three things are split:
generation and rewards, request by request, and the micro-batches of an update. So advantages, normalizers and the
order of everything are those of a single process by construction; only gradients, completions, rewards, metrics and
log-probabilities travel. Files and displays are the first rank's.

A run of one process never imports torch.distributed from here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from trapo.errors import TrapoError
from trapo.rewards import Item, Reward

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Holds this process's place among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Returns whether this rank writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Returns this rank's part of what all ranks hold: a block, so that neighbours (rollouts of a prompt) stay
        together."""
        count = len(items)
        return list(items[count * self.rank // self.world : count * (self.rank + 1) // self.world])

    def deal(self, items: Sequence[T], filler: T) -> list[T]:
        """Returns every world-th item, `filler` where they run out: all ranks get equally many, as collectives need."""
        rounds = -(-len(items) // self.world)
        dealt = list(items[self.rank :: self.world])
        return dealt + [filler] * (rounds - len(dealt))

    def gather(self, share: Sequence[T]) -> list[T]:
        """Returns the shares of all ranks, in their order, on every rank. What is in them is pickled."""
        if self.world == 1:
            return list(share)
        import torch.distributed as dist

        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, list(share))
        return [item for part in shares for item in part]

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on some rank: a decision that all must take together, such as to stop."""
        return any(self.gather([flag]))

    def once(self, function: Callable[[], T]) -> T:
        """Returns what function() gives on the first rank, which alone calls it, on every rank. Its TrapoError or
        OSError is raised on all."""
        if self.world == 1:
            return function()
        import torch.distributed as dist

        found: list[Any] = [None]
        if self.first:
            try:
                found = [function()]
            except (TrapoError, OSError) as error:
                found = [error]
        dist.broadcast_object_list(found, src=0)
        result: T | TrapoError | OSError = found[0]
        if isinstance(result, (TrapoError, OSError)):
            raise result
        return result

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather([None])


ALONE = Ranks()


def join() -> Ranks:
    """Returns the place that torchrun gave this process; ALONE without torchrun, or with one process."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        return ALONE
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave(ranks: Ranks) -> None:
    """Undo `join`."""
    if ranks.world > 1:
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Gives the place that torchrun gave this process. Raises TrapoError where another rank is gone meanwhile."""
    ranks = join()
    try:
        yield ranks
    except RuntimeError as error:
        if lost := lost_rank(ranks, error):
            raise lost from error
        raise
    finally:
        leave(ranks)


def lost_rank(ranks: Ranks, error: RuntimeError) -> TrapoError | None:
    """Returns the error of a run whose other processes are gone, if that is what `error` says; None for any other."""
    if ranks.world == 1:
        return None
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, torch.distributed.DistError) and not _LOST.search(text):
        return None
    return TrapoError(
        f"rank {ranks.rank} of {ranks.world}: another rank is gone ({text.splitlines()[0][:200]}); the same command "
        "continues from the last checkpoint"
    )


# What gloo and NCCL say of a peer that died. They raise plain RuntimeErrors as often as their own.
_LOST = re.compile(
    r"connection (closed|reset)|broken pipe|gloo|nccl|timed out|remote process|recvvalue|process group", re.IGNORECASE
)


class Scorer(Protocol):
    """Is what `RewardPool` is to those who use it."""

    def score(self, items: Sequence[Item]) -> list[Reward]: ...


class SharedRewards:
    """Makes a reward pool per rank act as one: each scores its part of what all ranks ask."""

    def __init__(self, pool: Scorer, ranks: Ranks) -> None:
        self.pool, self.ranks = pool, ranks
        self.wants_row = getattr(pool, "wants_row", False)

    def score(self, items: Sequence[Item]) -> list[Reward]:
        """Returns the rewards of (text, answer) pairs, in order, on every rank."""
        return self.ranks.gather(self.pool.score(self.ranks.share(items)))
