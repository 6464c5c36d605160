"""Batched generation for tiny Llama models: plain torch, a static KV cache, finished rows dropped on the way.

transformers' `generate` spends its time in Python here: a model of 0.4 M parameters takes longer to call than to
compute. The same numbers: tests/test_study.py holds greedy output against it.

Rotary embeddings depend on distances alone, so left-padded rows use their column as position and share one table row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trapo.engines.protocol import Completion, Request

SHRINK_AT = 0.75  # drop finished rows once fewer than this share is still going


class Weights:
    """A Llama's weights as few matrices: norms folded into the matrix behind them, q, k and v side by side.

    Within a head, q and k are reordered so that the two numbers that are rotated together are neighbours (a complex
    number); their products do not change.
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            q_k = torch.cat([a.q_proj.weight * self.width**-0.5, a.k_proj.weight])
            q_k = q_k.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)
            qkv = torch.cat([q_k, a.v_proj.weight]) * layer.input_layernorm.weight
            gate_up = torch.cat([m.gate_proj.weight, m.up_proj.weight]) * layer.post_attention_layernorm.weight
            self.layers.append((qkv.t(), a.o_proj.weight.t(), gate_up.t(), m.down_proj.weight.t()))
        self.embedding = model.model.embed_tokens.weight
        self.head = (model.lm_head.weight * model.model.norm.weight).t()
        self.inverse_frequencies = model.model.rotary_emb.inv_freq

    def rotation(self, length: int) -> Tensor:
        """Returns the rotary factors, complex [length, width / 2]."""
        angles = torch.arange(length)[:, None] * self.inverse_frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def normalised(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class StudyEngine:
    """Engine protocol (trapo/engines) over a small LlamaForCausalLM on the CPU."""

    def __init__(self, model: nn.Module, *, eos_id: int, pad_id: int, batch_size: int = 512) -> None:
        self.model, self.eos_id, self.pad_id, self.batch_size = model, eos_id, pad_id, batch_size

    def rest(self) -> None:
        """Does nothing: there is no memory of its own to free."""

    def sync(self, model: nn.Module) -> None:
        """Does nothing: every call reads the weights anew."""
        self.model = model

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        """Returns one completion per request, in their order; temperature 0 is greedy."""
        weights, generator = Weights(self.model), torch.Generator().manual_seed(seed)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), requests[i].context))
        completions: list[Completion] = [Completion((), False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = [requests[i] for i in indices]
            tokens = _Decoding(weights, batch, self.pad_id).run(temperature, generator, self.eos_id)
            for i, ids, request in zip(indices, tokens.tolist(), batch, strict=True):
                completions[i] = self._trim(ids, request.max_new_tokens)
        return completions

    def _trim(self, ids: list[int], limit: int) -> Completion:
        ids = ids[:limit]
        if self.eos_id not in ids:
            return Completion(tuple(ids), finished=False)
        return Completion(tuple(ids[: ids.index(self.eos_id) + 1]), finished=True)


class _Decoding:
    """One batch: prefill, then token after token."""

    def __init__(self, weights: Weights, requests: Sequence[Request], pad_id: int) -> None:
        self.w, self.pad_id = weights, pad_id
        unique = list(dict.fromkeys(r.context for r in requests))
        rows = {context: row for row, context in enumerate(unique)}
        self.prompt_width = max(map(len, unique))
        self.budget = max(r.max_new_tokens for r in requests)
        total = self.prompt_width + self.budget
        self.rotation = weights.rotation(total)
        ids = torch.tensor([[pad_id] * (self.prompt_width - len(c)) + list(c) for c in unique])
        starts = torch.tensor([self.prompt_width - len(c) for c in unique])  # [U] first real column
        # Additive mask over columns [U, total]: padding on the left is never seen.
        padded = torch.zeros(len(unique), total).masked_fill(torch.arange(total) < starts[:, None], -torch.inf)
        self.logits, filled = self._prefill(ids, padded)
        repeat = torch.tensor([rows[r.context] for r in requests])
        self.logits, self.padded = self.logits[repeat], padded[repeat, None, None]
        # Per layer, keys and values: [U, P, 2 KV, W] -> [B, 2 KV, P + budget, W].
        self.caches = [F.pad(x.transpose(1, 2)[repeat], (0, 0, 0, self.budget)) for x in filled]

    def _prefill(self, ids: Tensor, padded: Tensor) -> tuple[Tensor, list[Tensor]]:
        (rows, width), w = ids.shape, self.w
        causal = torch.full((width, width), -torch.inf).triu(1)
        mask = (padded[:, None, None, :width] + causal).clamp(min=-1e30)  # a padded row may see nothing: no NaN
        x, filled = w.embedding[ids].flatten(0, 1), []
        for layer in w.layers:
            q, kv = self._qkv(x.unflatten(0, (rows, width)), layer[0], self.rotation[:width, None])
            filled.append(kv)
            k, v = kv.repeat_interleave(w.heads // w.kv_heads, dim=2).transpose(1, 2).chunk(2, dim=1)
            seen = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=1.0)
            x = self._rest(x, seen.transpose(1, 2).reshape(len(x), -1), layer)
        return w.normalised(x.unflatten(0, (rows, width))[:, -1]) @ w.head, filled

    def _qkv(self, x: Tensor, matrix: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Returns q [..., H, W], and k and v [..., 2 KV, W], of x [..., D]."""
        w = self.w
        both = (w.normalised(x) @ matrix).unflatten(-1, (-1, w.width))
        q_k, v = both.split([w.heads + w.kv_heads, w.kv_heads], dim=-2)
        q, k = _rotate(q_k, rotation).split([w.heads, w.kv_heads], dim=-2)
        return q, torch.cat([k, v], dim=-2)

    def _rest(self, x: Tensor, seen: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
        """Returns x and seen [tokens, D]."""
        x = torch.addmm(x, seen, layer[1])
        gate, up = (self.w.normalised(x) @ layer[2]).chunk(2, dim=-1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer[3])

    def run(self, temperature: float, generator: torch.Generator, eos_id: int) -> Tensor:
        """Generates tokens [B, budget]; after the end mark comes padding."""
        tokens = torch.full((len(self.logits), self.budget), self.pad_id)
        alive = torch.arange(len(self.logits))  # rows of `tokens` that are still going
        done = torch.zeros(len(alive), dtype=torch.bool)
        for step in range(self.budget):
            picked = self._pick(temperature, generator)
            tokens[alive, step] = picked.masked_fill(done, self.pad_id)
            done |= picked == eos_id
            going = len(done) - int(done.sum())
            if going == 0 or step + 1 == self.budget:
                break
            if going < SHRINK_AT * len(done):
                keep = (~done).nonzero()[:, 0]
                alive, done, picked = alive[keep], done[keep], picked[keep]
                self._keep(keep)
            self._advance(picked, self.prompt_width + step)
        return tokens

    def _pick(self, temperature: float, generator: torch.Generator) -> Tensor:
        if temperature == 0:
            return self.logits.argmax(-1)
        # Exponential race: argmax p/E is a draw from p.
        noise = torch.empty_like(self.logits).exponential_(generator=generator)
        return (self.logits / temperature - noise.log()).argmax(-1)

    def _keep(self, rows: Tensor) -> None:
        self.padded = self.padded[rows]
        self.caches = [cache[rows] for cache in self.caches]

    def _advance(self, tokens: Tensor, column: int) -> None:
        """Feed one token per row [B] in at `column`; leaves the next logits [B, V]."""
        w, seen_columns = self.w, column + 1
        mask, rotation = self.padded[..., :seen_columns], self.rotation[column]
        x = w.embedding[tokens]
        for cache, layer in zip(self.caches, w.layers, strict=True):
            q, cache[:, :, column] = self._qkv(x, layer[0], rotation)
            keys, values = cache[:, :, :seen_columns].chunk(2, dim=1)
            q = q.unflatten(1, (w.kv_heads, -1))  # the heads that share a key are its queries
            seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=1.0)
            x = self._rest(x, seen.flatten(1), layer)
        self.logits = w.normalised(x) @ w.head
