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

from trapo.rollout import Completion, Request

SHRINK_AT = 0.75  # drop finished rows once fewer than this share is still going


class Weights:
    """A Llama's weights as few matrices: norms folded into the matrix behind them, q, k and v side by side."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            q = a.q_proj.weight * self.width**-0.5
            qkv = torch.cat([q, a.k_proj.weight, a.v_proj.weight]) * layer.input_layernorm.weight
            gate_up = torch.cat([m.gate_proj.weight, m.up_proj.weight]) * layer.post_attention_layernorm.weight
            self.layers.append((qkv.t(), a.o_proj.weight.t(), gate_up.t(), m.down_proj.weight.t()))
        self.embedding = model.model.embed_tokens.weight
        self.head = (model.lm_head.weight * model.model.norm.weight).t()
        self.inverse_frequencies = model.model.rotary_emb.inv_freq

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [length, width]."""
        angles = torch.arange(length)[:, None] * self.inverse_frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def normalised(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class StudyEngine:
    """Engine protocol (trapo/rollout) over a small LlamaForCausalLM on the CPU."""

    def __init__(self, model: nn.Module, *, eos_id: int, pad_id: int, batch_size: int = 512) -> None:
        self.model, self.eos_id, self.pad_id, self.batch_size = model, eos_id, pad_id, batch_size

    def sync(self, model: nn.Module) -> None:
        """Nothing to copy: every call reads the weights anew."""
        self.model = model

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        """One completion per request, in their order; temperature 0 is greedy."""
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
        self.cos, self.sin = weights.rotation(total)
        ids = torch.tensor([[pad_id] * (self.prompt_width - len(c)) + list(c) for c in unique])
        starts = torch.tensor([self.prompt_width - len(c) for c in unique])  # [U] first real column
        # Additive mask over columns [U, total]: padding on the left is never seen.
        padded = torch.zeros(len(unique), total).masked_fill(torch.arange(total) < starts[:, None], -torch.inf)
        self.logits, caches = self._prefill(ids, padded)
        repeat = torch.tensor([rows[r.context] for r in requests])
        self.logits, self.padded = self.logits[repeat], padded[repeat]
        self.keys, self.values = (self._room(c, repeat) for c in zip(*caches, strict=True))

    def _room(self, filled: Sequence[Tensor], repeat: Tensor) -> list[Tensor]:
        """Per layer [U, KV, P, W] -> [B, KV, P + budget, W]."""
        return [F.pad(x[repeat], (0, 0, 0, self.budget)) for x in filled]

    def _prefill(self, ids: Tensor, padded: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        width = ids.shape[1]
        causal = torch.full((width, width), -torch.inf).triu(1)
        mask = (padded[:, None, None, :width] + causal).clamp(min=-1e30)  # a padded row may see nothing: no NaN
        x, caches = self.w.embedding[ids], []
        for layer in self.w.layers:
            q, k, v = self._qkv(x, layer[0], self.cos[:width], self.sin[:width])
            caches.append((k, v))
            seen = F.scaled_dot_product_attention(q, self._spread(k), self._spread(v), attn_mask=mask, scale=1.0)
            x = self._rest(x, seen.transpose(1, 2).flatten(2), layer)
        return self.w.normalised(x[:, -1]) @ self.w.head, caches

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.w.heads // self.w.kv_heads, dim=1)

    def _qkv(self, x: Tensor, matrix: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, W], k and v [B, KV, T, W] of x [B, T, D]."""
        w = self.w
        both = (w.normalised(x) @ matrix).unflatten(-1, (-1, w.width)).transpose(1, 2)
        q_k, v = both.split([w.heads + w.kv_heads, w.kv_heads], dim=1)
        q, k = _rotate(q_k, cos, sin).split([w.heads, w.kv_heads], dim=1)
        return q, k, v

    def _rest(self, x: Tensor, seen: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
        x = x + seen @ layer[1]
        gate, up = (self.w.normalised(x) @ layer[2]).chunk(2, dim=-1)
        return x + (F.silu(gate) * up) @ layer[3]

    def run(self, temperature: float, generator: torch.Generator, eos_id: int) -> Tensor:
        """Tokens [B, budget]; after the end mark comes padding."""
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
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def _advance(self, tokens: Tensor, column: int) -> None:
        """Feed one token per row [B] in at `column`; leaves the next logits [B, V]."""
        w, seen_columns = self.w, column + 1
        cos, sin = self.cos[column], self.sin[column]
        mask = self.padded[:, None, None, :seen_columns]
        x = w.embedding[tokens][:, None]
        for i, layer in enumerate(w.layers):
            q, k, v = self._qkv(x, layer[0], cos, sin)
            self.keys[i][:, :, column], self.values[i][:, :, column] = k[:, :, 0], v[:, :, 0]
            keys, values = self.keys[i][:, :, :seen_columns], self.values[i][:, :, :seen_columns]
            q = q.squeeze(2).unflatten(1, (w.kv_heads, -1))  # [B, KV, H/KV, W]
            scores = q @ keys.transpose(-1, -2) + mask
            x = self._rest(x, (scores.softmax(-1) @ values).flatten(1)[:, None], layer)
        self.logits = w.normalised(x[:, 0]) @ w.head
