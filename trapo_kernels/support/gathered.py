"""This file computes logits of K ids a row alone: K rows of the weight are gathered for each, and nothing of the
vocabulary's size is made but the weight's gradient.

    x_k = scale · (h · W[id_k] + b[id_k])      before the soft-cap, in fp32 (fp64 for fp64); 0 where id_k is -1

2·N·K·D FLOPs and K rows of W read a token, where a GEMM over the vocabulary has 2·N·V·D: for V well above K. Rows are
gathered for as many tokens at a time as a block of 8 MiB holds. The sums into the weight's rows have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import check_backward, finish_all
from ..backends.base import stats_dtype
from ..call import Params, in_one_dtype
from ..shards.vocab_parallel import Shard

__all__ = ["GatheredLogits", "pays", "run", "run_backward"]

_BLOCK_BYTES = 2**23
# A gathered row costs as much as about so many rows of a GEMM (an EPYC at one thread: 110).
_GATHERED_COST = 128


def pays(ids: int, vocab: int) -> bool:
    """Returns whether gathering so many rows a token is cheaper than all logits."""
    return ids * _GATHERED_COST <= vocab


def _blocks(ids: Tensor, width: int, wide: torch.dtype, shard: Shard | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (rows, the place of each of their ids in the weight [C, K], whether it is there at all [C, K])."""
    step = max(1, _BLOCK_BYTES // max(1, ids.shape[1] * width * wide.itemsize))
    for start in range(0, ids.shape[0], step):
        at = slice(start, min(start + step, ids.shape[0]))
        index, here = (ids[at], ids[at] >= 0) if shard is None else shard.columns(ids[at])
        yield at, index.masked_fill(~here, 0), here


def run(params: Params, ids: Tensor, scale: float, shard: Shard | None = None) -> Tensor:
    """Returns the logits [N, K]."""
    hidden, weight, bias = in_one_dtype(params)
    assert hidden is not None
    assert weight is not None
    wide = stats_dtype(hidden.dtype)
    out = hidden.new_zeros(ids.shape, dtype=wide)
    if weight.shape[0]:
        for at, index, here in _blocks(ids, hidden.shape[1], wide, shard):
            rows = weight[index].to(wide)
            found = _product(rows, hidden[at].to(wide)[:, :, None]).squeeze(2)
            if bias is not None:
                found = found + bias[index]
            out[at] = (found * scale).masked_fill(~here, 0)
    if shard is not None:
        dist.all_reduce(out, group=shard.group)
    return out


def run_backward(
    params: Params, ids: Tensor, scale: float, grad: Tensor, wants: tuple[bool, ...], shard: Shard | None = None
) -> tuple[Tensor | None, ...]:
    """Returns gradients of hidden states, weight and bias in fp32 (fp64 for fp64), of gradients [N, K] that come in."""
    hidden, weight, _ = in_one_dtype(params)
    assert hidden is not None
    assert weight is not None
    wide = stats_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden, dtype=wide) if wants[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
    d_bias = weight.new_zeros(weight.shape[0], dtype=wide) if wants[2] else None
    for at, index, here in _blocks(ids, hidden.shape[1], wide, shard) if weight.shape[0] else ():
        g = (grad[at].to(wide) * scale).masked_fill(~here, 0)
        if d_hidden is not None:
            d_hidden[at] = _product(g[:, None, :], weight[index].to(wide)).squeeze(1)
        if d_weight is not None:
            outer = g[:, :, None] * hidden[at].to(wide)[:, None, :]
            _add_rows(d_weight, index.reshape(-1), outer.reshape(-1, hidden.shape[1]))
        if d_bias is not None:
            _add_rows(d_bias, index.reshape(-1), g.reshape(-1))
    if d_hidden is not None and shard is not None:
        dist.all_reduce(d_hidden, group=shard.group)
    return d_hidden, d_weight, d_bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b [C, ., .], which autocast leaves alone."""
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Computes total[index] += values, in a fixed order: on CUDA index_add races, a summing index_put sorts."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


class GatheredLogits(torch.autograd.Function):
    """Computes the logits [N, K]; the backward gathers again."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, scale: float, shard: Shard | None, wants: tuple[bool, ...], *params: Tensor | None
    ) -> Tensor:
        ctx.scale, ctx.shard, ctx.wants = scale, shard, wants
        ctx.save_for_backward(ids, *params)
        return run(params, ids, scale, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        check_backward("linear_support_logprobs", grad)
        ids, *params = ctx.saved_tensors
        found = run_backward(tuple(params), ids, ctx.scale, grad, ctx.wants, ctx.shard)
        return None, None, None, None, *finish_all(found, tuple(params), None)
