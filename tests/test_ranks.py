"""The update and the whole run do not depend on how the work is cut: micro-batches, packing, ranks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import load_file
from test_resume import timeless

from trapo.runs.ranks import ALONE, Ranks

# 8 rollouts of 6 to 12 tokens, all with a gradient: budgets that give the number of micro-batches in the test's name.
BUDGETS = {"padded": {1: 1000, 2: 48, 4: 24}, "packed": {1: 1000, 2: 36, 4: 20}}


CASES = [(form, n) for form in BUDGETS for n in (1, 2, 4)]
CHECKPOINTED, LOW, ADAPTED = ["model.gradient_checkpointing=true"], ["train.precision=bfloat16"], ["lora.rank=4"]


def overrides(form, micro_batches):
    packing = "always" if form == "packed" else "never"
    return [f"train.packing={packing}", f"train.micro_batch_tokens={BUDGETS[form][micro_batches]}"]


@pytest.fixture(scope="module")
def updates(tiny_model_path, tmp_path_factory):
    """{world: {case: what ranks_run.update gives}}."""
    out = tmp_path_factory.mktemp("updates") / "out.pt"
    names = [*CASES, "checkpointed", "low"]
    cases = [*(overrides(*case) for case in CASES), CHECKPOINTED, LOW]
    if importlib.util.find_spec("peft"):
        names, cases = [*names, "adapted"], [*cases, ADAPTED]
    found = {}
    for world in (1, 2):
        run_ranks(world, "update", tiny_model_path, out, json.dumps(cases))
        found[world] = dict(zip(names, torch.load(out), strict=True))
    return found


def check_same(found, expected):
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-6, rtol=0, msg=name)
    for report, right in zip(found["reports"], expected["reports"], strict=True):
        assert report["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-5)
        assert report["metrics"] == pytest.approx(right["metrics"], rel=1e-4, abs=1e-6)
        for name in ("optimizer_steps", "skipped_steps", "trained_tokens"):
            assert report[name] == right[name]


@pytest.mark.parametrize(("form", "micro_batches"), CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_update_is_that_of_one_micro_batch_on_one_rank(form, world, micro_batches, updates):
    """2 ranks with 1 micro-batch: the second rank has nothing but a filler."""
    check_same(updates[world][form, micro_batches], updates[1]["padded", 1])


def test_sharded_layers_recompute_their_activations_to_the_same_update(updates):
    check_same(updates[2]["checkpointed"], updates[1]["padded", 1])


def test_adapters_are_sharded_too(updates):
    pytest.importorskip("peft", reason="pip install 'trapo-kernels[lora]'")
    check_same(updates[2]["adapted"], updates[1]["adapted"])
    assert updates[1]["adapted"]["weights"].keys() == updates[1]["padded", 1]["weights"].keys()


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_computes_in_it_and_keeps_float32_weights(world, updates):
    low, full = updates[world]["low"], updates[1]["padded", 1]
    assert updates[world]["padded", 1]["dtypes"] == ["torch.float32"]
    assert low["dtypes"] == (["torch.bfloat16"] if world > 1 else low["dtypes"])
    moved = False
    for name, value in full["weights"].items():
        assert low["weights"][name].dtype == torch.float32
        moved |= not low["weights"][name].equal(low["weights"][name].bfloat16().float())
        assert (low["weights"][name] - value).abs().max() < 1e-3  # three steps of at most lr = 1e-3 each
    assert moved  # by less than bfloat16 can say
    for report, right in zip(low["reports"], full["reports"], strict=True):
        assert report["grad_norm"] == pytest.approx(right["grad_norm"], rel=0.05)


def test_each_rank_keeps_its_part_of_the_weights(updates):
    assert updates[2]["padded", 1]["own"] <= updates[1]["padded", 1]["own"] // 2 + 1000


def test_the_update_that_is_compared_with_is_one(updates, tiny_model_path):
    whole = updates[1]["padded", 1]
    before = load_file(tiny_model_path / "model.safetensors")
    moved = [(whole["weights"][name] - value).abs().max() for name, value in before.items()]
    assert min(moved) > 1e-5
    assert all(r["metrics"]["expert_tokens"] and r["metrics"]["own_tokens"] for r in whole["reports"])


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_budgets_above_give_the_micro_batches_that_they_say(form, micro_batches):
    from test_learner import rollouts

    from trapo.batching import micro_batches as buckets
    from trapo.batching import packs

    cut = packs if form == "packed" else buckets
    assert len(cut([len(r) for r in rollouts()], BUDGETS[form][micro_batches])) == micro_batches


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_shares_are_everything_once_in_order_and_deals_are_equally_long(world, count):
    items = list(range(count))
    assert [i for rank in range(world) for i in Ranks(rank, world).share(items)] == items
    deals = [Ranks(rank, world).deal(items, None) for rank in range(world)]
    assert len({len(deal) for deal in deals}) == 1
    assert sorted(i for deal in deals for i in deal if i is not None) == items
    assert sum(deal.count(None) for deal in deals) < world


def test_one_process_gathers_by_itself_and_leaves_torch_distributed_alone():
    code = (
        "import sys\n"
        "from trapo.runs.ranks import join\n"
        "ranks = join()\n"
        "assert ranks.gather([1, 2]) == [1, 2] and ranks.any(True) and not ranks.any(False)\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert ALONE.first


def outcome(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evals = {f.name: f.read_text() for f in sorted((run_dir / "eval").iterdir())}
    for name in [name for name in evals if name.endswith(".json")]:  # numbers: the rest is text
        evals[name] = json.loads(evals[name])
    return [timeless(row) for row in rows], evals


def same_evals(found, expected):
    """Every sampled response and every count; the mean likelihood of traces, but for rounding, too."""
    close(found, expected)
    for name in expected:
        if isinstance(expected[name], dict):
            expected[name]["trace_nll"] = found[name]["trace_nll"]
    assert found == expected


# Greedy evaluation, sampled training: a temperature for both. eps as in ranks_run.py.
SETTINGS = (
    "rollout.seeding=request", "optim.eps=1e-3", "optim.lr=1e-3", "eval.temperature=1.0", "checkpoint.keep=9",
)  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_ranks(1, "train", tiny_model_path, run_dir, *SETTINGS)
    return run_dir


def close(found, expected):
    """Equal but for the rounding of sums in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def two_ranks(tiny_model_path, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two") / "run"
    outputs = run_ranks(2, "train", tiny_model_path, run_dir, *SETTINGS)
    return run_dir, outputs


def test_a_run_on_two_ranks_is_the_run_on_one(one_rank, two_ranks):
    run_dir, _ = two_ranks
    rows, evals = outcome(run_dir)
    expected_rows, expected_evals = outcome(one_rank)
    for row, expected in zip(rows, expected_rows, strict=True):
        close(row, expected)
    same_evals(evals, expected_evals)
    weights, expected_weights = (load_file(d / "final" / "model.safetensors") for d in (run_dir, one_rank))
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)


def test_only_the_first_rank_shows_and_writes(two_ranks):
    _, (first, second) = two_ranks
    assert "held-out accuracy" in first
    assert second.strip() == "{}"


def test_the_final_model_of_two_ranks_loads_with_transformers_and_is_complete(two_ranks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = two_ranks[0] / "final"
    model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(final).chat_template


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_is_continued_on_another_number_of_ranks(
    before, after, one_rank, two_ranks, tiny_model_path, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(one_rank if before == 1 else two_ranks[0], run_dir)
    # As if it had been interrupted in step 5 of 6.
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "final")
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")
    assert (run_dir / "checkpoints" / "step-000004" / "shards").exists() == (before == 2)
    (out, *_) = run_ranks(after, "train", tiny_model_path, run_dir, *SETTINGS, f"run_dir={run_dir}")
    assert "after step 4" in out
    rows, _ = outcome(run_dir)
    for row, expected in zip(rows, outcome(one_rank)[0], strict=True):
        close(row, expected)
    weights, expected_weights = (load_file(d / "final" / "model.safetensors") for d in (run_dir, one_rank))
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0, msg=name)


SAID = "stopped by SIGTERM after step 2; the same command continues from there"


def test_a_rank_that_is_asked_to_stop_stops_all_after_the_step_and_they_continue(two_ranks, tiny_model_path, tmp_path):
    run_dir = tmp_path / "run"
    outputs = run_ranks(2, "stopped", tiny_model_path, run_dir, *SETTINGS)
    assert [out.splitlines()[-1] for out in outputs] == [SAID] * 2
    run_ranks(2, "train", tiny_model_path, run_dir, *SETTINGS)
    rows, evals = outcome(run_dir)
    expected_rows, expected_evals = outcome(two_ranks[0])
    for row, expected in zip(rows, expected_rows, strict=True):
        close(row, expected)
    same_evals(evals, expected_evals)


def test_without_the_optimizers_state_the_continuation_would_differ(one_rank):
    """So the test above sees whether it was restored."""
    states = [torch.load(p / "trainer_state.pt") for p in sorted((one_rank / "checkpoints").iterdir())]
    moments = states[1]["learner"]["optimizer"]["state"]
    assert all(s["exp_avg"].abs().max() > 1e-4 for s in list(moments.values())[:1])
    assert len(states) == 3


def test_the_shards_hold_the_trained_weights_and_both_moments(two_ranks):
    from torch.distributed.checkpoint import FileSystemReader

    names = (
        FileSystemReader(two_ranks[0] / "checkpoints" / "step-000004" / "shards").read_metadata().state_dict_metadata
    )
    for part in ("model.model.norm.weight", "optimizer.state.model.norm.weight.exp_avg"):
        assert part in names
    assert "optimizer.state.model.norm.weight.exp_avg_sq" in names
