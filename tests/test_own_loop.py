"""Engine hf's own loop against transformers' on models of many families, and what it keeps between calls."""

import dataclasses
import logging

import pytest
import torch
from model_types import texts, tiny_model
from torch import nn

from trapo.config import LoraConfig
from trapo.engines import own_loop, packed_linears
from trapo.engines.columns import ColumnCache, size
from trapo.engines.hf import HFEngine
from trapo.engines.kept_prompts import KeptPrompts
from trapo.engines.protocol import Request
from trapo.engines.transformers_loop import TransformersLoop
from trapo.engines.ways import WAYS, Way
from trapo.errors import TrapoError
from trapo.models import lora

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",  # soft-caps, eager attention, sliding windows
    "gpt2",  # learned positions, Conv1D
    "bloom",  # no positions but in the mask
    "gpt_oss",  # attention sinks, experts
    "deepseek_v3",  # keys and values of different widths
]
SLOW = [
    "mistral",
    "gemma3_text",
    "gemma3n_text",
    "phi3",
    "granite",
    "cohere2",
    "olmo2",
    "starcoder2",
    "gpt_neox",
    "opt",
]
SLOW += ["mixtral", "qwen2_moe", "smollm3", "glm4", "llama4_text", "falcon", "mpt", "qwen2"]
THEIRS = Way(own=False)


@pytest.fixture(autouse=True)
def small_weights_are_packed_too(monkeypatch):
    monkeypatch.setattr(packed_linears, "SMALL", 0)
    monkeypatch.setattr(own_loop, "FEWEST_TOKENS", 1)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def requests(count=14):
    """Contexts of one token to more than a window, some several times, some that begin as others do."""
    contexts = texts(12, 9, 5, 12, 1, 30)
    contexts[3] = contexts[0][:6] + contexts[3][6:]
    return [Request(tuple(contexts[i % 6]), 1 + 4 * (i % 4), keep=i % 2 == 0) for i in range(count)]


def theirs(model, asked, eos_ids, temperature=0.0, way=THEIRS):
    with torch.no_grad():
        loop = TransformersLoop(model, eos_ids=eos_ids, pad_id=1, batch_size=64)
        return loop.decode(asked, temperature, way)


def engine(model, eos_ids=(), batch_size=64, **settings):
    return HFEngine(model, eos_ids=list(eos_ids), pad_id=1, batch_size=batch_size, **settings)


def greedy(made, asked):
    return made.generate(asked, temperature=0.0, seed=0)


@pytest.mark.parametrize("kind", [*FAMILIES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_greedy_tokens_are_those_of_transformers(kind):
    model, asked = tiny_model(kind), requests()
    endless = theirs(model, asked, [])
    # Tokens that end some of them, and not all.
    counted = {token: sum(token in c.token_ids for c in endless) for c in endless for token in c.token_ids}
    ends = {token for token in counted if 2 < counted[token] < 9}
    ends = set(sorted(ends)[:2])
    expected = theirs(model, asked, ends)
    assert 2 < sum(c.finished for c in expected) < len(asked)
    assert len({c.token_ids for c in expected}) > 5
    for batch_size in (64, 5, 1):  # all at once; rows that are filled again; one by one
        made = engine(model, ends, batch_size)
        assert greedy(made, asked) == expected
        assert made.way == WAYS[0]
        assert greedy(made, asked) == expected  # with what it has kept


def test_a_row_that_stays_long_moves_its_columns_and_not_its_tokens(llama, monkeypatch):
    """A long answer among many short ones, with no columns to spare."""
    monkeypatch.setattr(own_loop, "SPARE_COLUMNS", 0)
    asked = [Request(tuple(ids), limit) for ids, limit in zip(texts(3, 4, *[9] * 12), [40, 25] + [3] * 12, strict=True)]
    expected = theirs(llama, asked, [])
    moved = []
    move = ColumnCache.move_columns
    monkeypatch.setattr(ColumnCache, "move_columns", lambda *args: moved.append(args[1:]) or move(*args))
    assert greedy(engine(llama, batch_size=3), asked) == expected
    assert moved


def test_what_is_kept_is_not_computed_again(llama):
    prompts = [tuple(ids) for ids in texts(20, 24)]
    made = engine(llama)
    greedy(made, [Request(prompts[0], 2)])
    assert made.own.prompts.bytes == 0  # nobody asked for that

    def prefilled(*contexts, keep=True):
        before = made.own.prefilled
        asked = [Request(context, 6, keep=keep) for context in contexts]
        assert greedy(made, asked) == greedy(engine(llama), asked)
        return made.own.prefilled - before

    # All but the last token, which the first step computes.
    assert prefilled(*prompts, prompts[0]) == 19 + 23
    assert prefilled(*prompts) == 0
    assert prefilled((*prompts[0], 11, 12, 13)) == 3
    assert prefilled((*prompts[0], 11, 12, 40), (*prompts[1], 9, 9)) == 2
    assert prefilled((*prompts[0][:7], 3, 4), keep=False) == 1
    made.sync(llama)
    assert prefilled(prompts[1]) == 23
    made.rest()
    assert made.own.prompts.bytes == 0
    assert made.own.packed.stand_ins is None


def test_what_all_contexts_of_a_call_begin_with_is_computed_once(llama):
    system, *tails = (tuple(ids) for ids in texts(own_loop.SHORTEST_BEGINNING, 5, 9, 3))
    asked = [Request(system + tail, 8) for tail in tails]
    for batch_size in (64, 1):
        made = engine(llama, batch_size=batch_size)
        greedy(made, [])
        before = made.own.prefilled  # the check has computed some
        assert greedy(made, asked) == theirs(llama, asked, [])
        assert made.own.prefilled - before == len(system) + sum(len(tail) - 1 for tail in tails)


def test_kept_prompts_stay_within_their_bytes_and_the_least_used_go_first():
    def filled(tokens):
        return [(torch.full((2, tokens, 4), float(tokens)), torch.zeros(2, tokens, 4)), None]

    kept = KeptPrompts(3 * size(filled(10)))
    for first in (1, 2, 3):
        kept.add((first, *range(10, 19)), filled(10))
    assert kept.find((1, 10, 11, 5))[0][0].shape[1] == 3
    kept.add((4, *range(10, 19)), filled(10))  # in place of 2, which was used least recently
    assert kept.find((2, 10, 11)) is None
    assert all(kept.find((first, 10)) is not None for first in (1, 3, 4))
    assert kept.bytes == 3 * size(filled(10))
    kept.add((4, *range(10, 24)), filled(15))  # in place of its beginning, and of what is too much then
    assert kept.find((4, *range(10, 30)))[0][0].shape[1] == 15
    kept.add((4, 10, 11), filled(3))  # known already
    assert kept.order == sorted(kept.kept)
    assert len(kept.order) == 2
    kept.add((9,), filled(31))
    assert kept.find((9,)) is None
    kept.clear()
    assert (kept.bytes, kept.order, kept.kept) == (0, [], {})


def fused_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.05, fused=True).step()


@torch.no_grad()
def through_data(model):
    for p in model.parameters():
        p.data.mul_(torch.linspace(0.5, 1.5, p.numel()).view_as(p))


@pytest.mark.parametrize("change", [fused_step, through_data])
def test_a_forgotten_sync_changes_nothing(change, monkeypatch):
    model = tiny_model("llama")
    asked = [dataclasses.replace(r, keep=True, max_new_tokens=8) for r in requests()]
    made = engine(model)
    before = greedy(made, asked)
    change(model)
    expected = greedy(engine(model), asked)
    assert before != expected
    with monkeypatch.context() as patch:
        patch.setattr(made.own, "check_weights", lambda mark: None)
        assert greedy(made, asked) != expected  # or nothing that can go stale was in use
    assert greedy(made, asked) == expected


def sampled(made, asked, seed=1):
    return made.generate(asked, temperature=1.0, seed=seed)


def test_what_a_request_samples_depends_on_its_seed_and_on_nothing_beside_it(llama):
    asked = [dataclasses.replace(r, seed=100 + i, max_new_tokens=9) for i, r in enumerate(requests())]
    whole = sampled(engine(llama), asked)
    assert sampled(engine(llama, batch_size=3), asked, seed=2) == whole
    assert sampled(engine(llama), asked[::-1])[::-1] == whole
    assert [sampled(engine(llama), [r])[0] for r in asked[:4]] == whole[:4]
    longer = [dataclasses.replace(r, max_new_tokens=90) for r in asked[:3]]
    assert [c.token_ids[:9] for c in sampled(engine(llama), longer)] == [c.token_ids for c in whole[:3]]
    other = sampled(engine(llama), [dataclasses.replace(r, seed=r.seed + 1) for r in asked])
    assert all(a != b for a, b in zip(other, whole, strict=True))


def test_a_call_without_seeds_of_requests_goes_by_its_own_seed(llama):
    asked = [Request(requests()[0].context, 9)] * 5
    first = sampled(engine(llama), asked)
    assert sampled(engine(llama, batch_size=2), asked) == first
    assert len({c.token_ids for c in first}) == 5
    assert sampled(engine(llama), asked, seed=2) != first


def test_sampled_tokens_follow_the_model_to_the_second_token(llama):
    context, n = tuple(texts(6)[0]), 3000
    got = sampled(engine(llama, batch_size=n), [Request(context, 2)] * n)
    first = max({c.token_ids[0] for c in got}, key=lambda t: sum(c.token_ids[0] == t for c in got))
    for prefix, drawn in (
        ((), [c.token_ids[0] for c in got]),
        ((first,), [c.token_ids[1] for c in got if c.token_ids[0] == first]),
    ):
        with torch.no_grad():
            p = llama(torch.tensor([[*context, *prefix]])).logits[0, -1].softmax(-1)
        shares = torch.bincount(torch.tensor(drawn), minlength=len(p)) / len(drawn)
        assert len(drawn) > 60
        assert ((shares - p).abs() <= 4.5 * (p * (1 - p) / len(drawn)).sqrt() + 2 / len(drawn)).all()


def test_empty_calls_and_calls_for_one_token(llama):
    made = engine(llama)
    assert greedy(made, []) == []
    asked = [Request(r.context, 1) for r in requests()]
    assert greedy(made, asked) == theirs(llama, asked, [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stop_the_run_in_one_line(temperature):
    model = tiny_model("llama")
    made = engine(model)
    greedy(made, requests())
    with torch.no_grad():
        model.lm_head.weight[3, 2] = float("nan")
    with pytest.raises(TrapoError, match=r"^rollout\.engine: .*NaN") as error:
        made.generate(requests(), temperature=temperature, seed=0)
    assert "\n" not in str(error.value)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_a_loop_that_is_wrong_for_a_family_is_not_used_and_the_reason_is_said(llama, monkeypatch, caplog):
    right = ColumnCache.load

    def negative_values(cache, filled, first_row, end):
        right(cache, [[(keys, -values) for keys, values in row] for row in filled], first_row, end)

    monkeypatch.setattr(ColumnCache, "load", negative_values)
    made = engine(llama)
    with caplog.at_level(logging.WARNING, "trapo"):
        assert greedy(made, requests()) == theirs(llama, requests(), [])
    assert made.way == WAYS[1]
    assert "model type llama (LlamaForCausalLM) generates with transformers' loop (logits" in caplog.text


@pytest.mark.parametrize("fault", ["moved rows", "kept prompts", "packed weights"])
def test_the_check_sees_faults_in_what_few_requests_would_not_use(llama, monkeypatch, fault):
    if fault == "moved rows":
        monkeypatch.setattr(ColumnCache, "move_rows", lambda cache, moves: None)
    elif fault == "kept prompts":
        find = KeptPrompts.find
        monkeypatch.setattr(
            KeptPrompts, "find", lambda kept, context: find(kept, context) and find(kept, kept.order[0])
        )
    else:
        call = packed_linears.PackedLinear.__call__
        monkeypatch.setattr(packed_linears.PackedLinear, "__call__", lambda linear, x: 1.1 * call(linear, x))
    made = engine(llama)
    greedy(made, [Request((9, 10), 1)])
    assert made.way == WAYS[1]


def test_adapters_are_generated_with_and_only_plain_linears_are_packed():
    model = tiny_model("llama")
    lora.attach(model, LoraConfig(rank=2, alpha=8.0), base="", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    asked = [dataclasses.replace(r, keep=True) for r in requests()]
    made = engine(model)
    assert greedy(made, asked) == theirs(model, asked, [])
    assert made.way == WAYS[0]
    names = {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() for s in made.own.packed.stand_ins if s.linear is m
    }
    assert {"base_layer", "default", "lm_head"} == names
    before = greedy(made, asked)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(-20)
    assert greedy(made, asked) == theirs(model, asked, []) != before


def test_float32_weights_compute_in_16_bits_where_that_is_asked(llama):
    asked = [Request(r.context, 1) for r in requests()]
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(llama, asked, [], way=Way(own=False, share=False))
    made = engine(llama, precision="bfloat16")
    got = greedy(made, asked)
    assert made.way == WAYS[0]
    # A padded batch rounds otherwise: a token may be another one that the logits tell apart by no more than rounding.
    for request, a, b in zip(asked, got, expected, strict=True):
        with torch.no_grad():
            logits = llama(torch.tensor([request.context])).logits[0, -1]
        assert logits[a.token_ids[0]] >= logits[b.token_ids[0]] - 0.02 * logits.abs().max()


def test_16_bit_models_generate():
    model = tiny_model("llama").to(torch.bfloat16)
    made = engine(model)
    got = greedy(made, requests())
    assert made.way == WAYS[0]
    assert [len(c.token_ids) for c in got] == [r.max_new_tokens for r in requests()]
