"""TrapoGRPOTrainer beside TRL's own trainer: the same loss, gradients and metrics; expert prefixes on top."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from kernel_cases import assert_close

import trapo_kernels as tk

pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer

    from trapo.data.encode import Trace
    from trapo.guidance import ALWAYS, NEVER, schedule
    from trapo.integrations.guided_rollouts import draw_guided
    from trapo_kernels.integrations.trl import TrapoGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["2 + 3 =", "The sky is", "One two three", "Why"]
TRACES = ["5 is the sum of two and three", "blue over the sea", "four five six seven", "because it is so"]


def digits(completions, **kwargs):
    """A reward that random models earn now and then."""
    return [sum(c.isdigit() or c in "aeiou" for c in text) / (len(text) + 1) for text in completions]


def make_trainer(kind, path, folder, *, traces=False, seed=0, **settings):
    names = ("objective", "guidance", "backend", "reward_range")
    options = {name: settings.pop(name) for name in names if name in settings}
    rows = {"prompt": PROMPTS * 4}
    if traces:
        rows["trace"] = TRACES * 4
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
        "max_completion_length": 12, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "seed": seed, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "loss_type": "dapo", "shuffle_dataset": False,
    }  # fmt: skip
    config = GRPOConfig(str(folder), **{**defaults, **settings})
    return kind(str(path), reward_funcs=digits, args=config, train_dataset=datasets.Dataset.from_dict(rows), **options)


LOSSES = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo+kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
    "dapo+entropy": {"loss_type": "dapo", "entropy_coef": 0.05},
    "grpo+entropy": {"loss_type": "grpo", "entropy_coef": 0.05},
    "bnpo+kl+entropy": {
        "loss_type": "bnpo",
        "beta": 0.1,
        "entropy_coef": 0.05,
        "use_bias_correction_kl": False,
    },
    "delta": {"loss_type": "dapo", "delta": 1.5, "epsilon_high": 0.3},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
}
TWO_PASSES = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "top entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    "off-policy mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
    "grpo+kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "corrected kl": {"loss_type": "dapo", "beta": 0.1},
}


def make_inputs(trainer, seed=0):
    """What `_generate_and_score_completions` returns, off-policy, with ragged lengths."""
    g = torch.Generator().manual_seed(seed)
    vocab, rows, p, c = trainer.model.config.vocab_size, 4, 5, 12
    prompt_mask = torch.ones(rows, p, dtype=torch.long)
    prompt_mask[1, :2] = 0
    mask = (torch.arange(c)[None] < torch.tensor([12, 7, 1, 9])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(3, vocab, (rows, p), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocab, (rows, c), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.3, -0.7, 0.0, -1.1]),
        "num_items_in_batch": torch.tensor(61),
    }
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([prompt_mask, mask], 1), c,
        )  # fmt: skip
    # Away from the clip's edges, where rounding would decide.
    steps = torch.tensor([-0.6, -0.3, -0.05, 0.0, 0.05, 0.4, 0.6])
    inputs["old_per_token_logps"] = logps - steps[torch.randint(0, 7, (rows, c), generator=g)]
    inputs["ref_per_token_logps"] = logps + 0.3 * torch.randn(rows, c, generator=g)
    return inputs


def loss_gradients_metrics(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.detach(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


# Half a minute of building trainers is kept for `make test-slow`.
QUICK = {"dapo", "grpo", "dapo+entropy", "bnpo+kl+entropy", "delta", "gspo", "top entropy", "off-policy mask"}


def slow_unless(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_unless(QUICK, [*LOSSES, *TWO_PASSES]))
def test_loss_gradients_and_metrics_are_those_of_trl(name, tiny_model_path, tmp_path):
    settings = {**LOSSES, **TWO_PASSES}[name]
    stock = make_trainer(GRPOTrainer, tiny_model_path, tmp_path, **settings)
    ours = make_trainer(TrapoGRPOTrainer, tiny_model_path, tmp_path, **settings)
    assert ours.loss_path.startswith("one pass" if name in LOSSES else "two passes: ")
    inputs = make_inputs(stock)
    if "beta" not in settings:
        del inputs["ref_per_token_logps"]
    expected, expected_grads, expected_metrics = loss_gradients_metrics(stock, inputs)
    loss, grads, metrics = loss_gradients_metrics(ours, inputs)
    assert (ours.fused.path == "one pass") == (name in LOSSES)  # and stayed so
    assert_close(loss, expected, 1e-5, "loss", floor=0.1)
    largest = max(float(g.abs().max()) for g in expected_grads.values())
    for key, grad in expected_grads.items():
        assert_close(grads[key], grad, 1e-4, key, floor=largest)
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", slow_unless({"dapo+kl"}, ["dapo", "grpo+entropy", "dapo+kl"]))
def test_real_steps_give_the_losses_and_metrics_of_trl(name, tiny_model_path, tmp_path):
    logs = []
    for kind in (GRPOTrainer, TrapoGRPOTrainer):
        trainer = make_trainer(kind, tiny_model_path, tmp_path, **LOSSES[name])
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "reward" in row])
    stock, ours = logs
    assert len(stock) == 3
    for a, b in zip(ours, stock, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            if "time" not in key:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5, nan_ok=True), key


# Expert prefixes ---------------------------------------------------------------------------------------------

ALWAYS_GUIDED = schedule([2, 1, 1], [0.0, 0.5, 1.0], [NEVER, ALWAYS, ALWAYS])


def test_the_one_pass_loss_with_expert_tokens_is_the_plain_one(tiny_model_path, tmp_path):
    trainer = make_trainer(
        TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, guidance=ALWAYS_GUIDED, entropy_coef=0.03,
        epsilon_high=0.28,
    )  # fmt: skip
    assert trainer.loss_path == "one pass"
    inputs = make_inputs(trainer)
    del inputs["ref_per_token_logps"]
    inputs["expert_mask"] = torch.arange(12)[None] < torch.tensor([0, 4, 1, 3])[:, None]
    loss, grads, metrics = loss_gradients_metrics(trainer, inputs)
    # The same from all logits, in plain torch.
    trainer.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    log_pi = trainer.model(input_ids=ids, attention_mask=attention).logits[:, 4:-1].log_softmax(-1)
    logp = log_pi.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    p, ratio, a = logp.exp(), (logp - inputs["old_per_token_logps"]).exp(), inputs["advantages"][:, None]
    own = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
    expert = torch.where(p >= 0.1, -logp, 1 - math.log(0.1) - p / 0.1)
    token = torch.where(inputs["expert_mask"], expert, own) - 0.03 * entropy
    # 61 tokens in the generation batch, which is one accumulation window of two micro-batches.
    expected = (token * inputs["completion_mask"]).sum() / 61
    expected.backward()
    assert_close(loss, expected, 1e-5, "loss")
    largest = max(float(q.grad.abs().max()) for q in trainer.model.parameters())
    for name, q in trainer.model.named_parameters():
        assert_close(grads[name], q.grad, 1e-4, name, floor=largest)
    mask = inputs["expert_mask"] & inputs["completion_mask"].bool()
    assert metrics["expert/tokens"] == mask.sum()
    assert metrics["expert/prob"] == pytest.approx(p[mask].mean().item(), rel=1e-4)


def test_two_passes_with_expert_tokens_add_the_expert_term_to_trls_loss(tiny_model_path, tmp_path):
    settings = {"loss_type": "cispo", "epsilon_high": 5.0}
    stock = make_trainer(GRPOTrainer, tiny_model_path, tmp_path, **settings)
    ours = make_trainer(
        TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, guidance=ALWAYS_GUIDED, **settings
    )  # fmt: skip
    inputs = make_inputs(stock)
    del inputs["ref_per_token_logps"]
    expert = torch.arange(12)[None] < torch.tensor([0, 4, 1, 3])[:, None]
    own_only = {**inputs, "tool_mask": (~expert).long()}
    expected, expected_grads, _ = loss_gradients_metrics(stock, own_only)
    with_expert = {**inputs, "expert_mask": expert}
    loss, grads, _ = loss_gradients_metrics(ours, with_expert)
    # The difference is TrSFT over the expert tokens.
    ours.model.zero_grad()
    logps, _, _ = ours._get_per_token_logps_and_entropies(
        ours.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), 12,
    )  # fmt: skip
    logp = logps[expert & inputs["completion_mask"].bool()]
    values = torch.where(logp.exp() >= 0.1, -logp, 1 - math.log(0.1) - logp.exp() / 0.1)
    (values.sum() / 61).backward()
    assert_close(loss, expected + values.sum() / 61, 1e-5, "loss")
    for name, q in ours.model.named_parameters():
        assert_close(grads[name], expected_grads[name] + q.grad, 1e-4, name, floor=float(grads[name].abs().max()))


def test_guided_training_supervises_the_prefixes_and_scores_whole_responses(tiny_model_path, tmp_path):
    trainer = make_trainer(TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, guidance=ALWAYS_GUIDED)
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert all(row["expert/guided"] == 0.5 for row in rows)
    assert all(row["expert/tokens"] > 0 for row in rows)
    tokenizer = trainer.processing_class
    traces = {
        prompt: [*tokenizer(trace).input_ids, tokenizer.eos_token_id]
        for prompt, trace in zip(PROMPTS, TRACES, strict=True)
    }
    whole = 0
    for inputs in seen:
        for i in range(4):
            prompt = tokenizer.decode(inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()])
            expert = inputs["completion_ids"][i][inputs["expert_mask"][i]].tolist()
            assert expert == traces[prompt][: len(expert)]
            if len(expert) == min(len(traces[prompt]), 12):
                whole += 1
                assert inputs["completion_mask"][i].sum() == len(expert)  # nothing of its own
    assert whole == len(seen)  # a quarter of the rows
    assert seen[0]["num_items_in_batch"] == sum(int(inputs["completion_mask"].sum()) for inputs in seen[:2])


@pytest.mark.slow
def test_two_launched_ranks_score_their_own_rollouts_and_keep_one_model(tiny_model_path, tmp_path):
    script = Path(__file__).with_name("two_ranks.py")
    # What `accelerate launch` runs for several processes of a machine; the processes' accelerator is told to be a CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=29533"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, str(script), str(tiny_model_path), str(tmp_path)], check=True, env=env, timeout=500)
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["log"][0]["expert/guided"] == 0.5
    for rank in ranks:
        assert len(rank["seen"]) == 2
        for batch in rank["seen"]:
            mean = sum(batch["rewards"]) / 4
            assert batch["advantages"] == pytest.approx([r - mean for r in batch["rewards"]], abs=1e-6)
            assert max(map(abs, batch["advantages"])) > 0.01
    assert ranks[0]["seen"][0]["rewards"] != ranks[1]["seen"][0]["rewards"]


def test_a_given_objective_decides_the_loss(tiny_model_path, tmp_path):
    trainer = make_trainer(
        TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, guidance=ALWAYS_GUIDED, epsilon=0.2,
        objective=tk.Objective.luffy(luffy_gamma=0.3, expert_coef=0.5),
    )  # fmt: skip
    inputs = make_inputs(trainer)
    del inputs["ref_per_token_logps"]
    inputs["expert_mask"] = torch.arange(12)[None] < torch.tensor([0, 4, 1, 3])[:, None]
    loss, _, _ = loss_gradients_metrics(trainer, inputs)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1), 12,
    )  # fmt: skip
    p, a = logps.exp(), inputs["advantages"][:, None]
    own = -(logps - inputs["old_per_token_logps"]).exp() * a  # LUFFY does not clip, whatever epsilon says
    token = torch.where(inputs["expert_mask"], -0.5 * a * p / (p + 0.3), own)
    assert_close(loss, (token * inputs["completion_mask"]).sum() / 61, 1e-5, "loss")


def test_thresholds_see_shares_of_the_declared_range_and_sums_outside_end_the_training(tiny_model_path, tmp_path):
    asked = schedule([2, 2], [0.0, 0.5], [NEVER, 0.6])

    def guided(reward_range):
        trainer = make_trainer(
            TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, guidance=asked, reward_range=reward_range,
            max_steps=1,
        )  # fmt: skip
        trainer.reward_weights.fill_(0.0)  # every sum is 0
        trainer.train()
        return trainer.state.log_history[0]["expert/guided"]

    assert guided((-1.0, 1.0)) == 0.5  # 0 is half of it, below 0.6
    assert guided((-3.0, 1.0)) == 0.0  # three quarters
    with pytest.raises(
        ValueError, match=r"reward_range must hold every weighted sum .* got 0 with reward_range=\(1, 2\)"
    ):
        guided((1.0, 2.0))


def test_settings_that_do_not_go_together_are_refused(tiny_model_path, tmp_path):
    def build(**settings):
        return make_trainer(TrapoGRPOTrainer, tiny_model_path, tmp_path, traces=True, **settings)

    with pytest.raises(ValueError, match="guidance sizes must add up to num_generations=4; got 8"):
        build(guidance="paper")
    with pytest.raises(ValueError, match=r"guidance must be 'paper', 'official', a Schedule or None; got 'magic'"):
        build(guidance="magic")
    with pytest.raises(ValueError, match=r"reward_range must be two finite numbers, the lower one first; got \(1, 0\)"):
        build(guidance=ALWAYS_GUIDED, reward_range=(1, 0))
    with pytest.raises(ValueError, match=r"loss_type must be bnpo, dr_grpo, dapo with an objective; got 'grpo'"):
        build(objective=tk.Objective.trapo(), loss_type="grpo")
    with pytest.raises(ValueError, match="must have an expert term with guidance"):
        build(objective=tk.Objective.grpo(), guidance=ALWAYS_GUIDED)
    with pytest.raises(ValueError, match=r"beta must not be 0 with kl_coef=0.1"):
        build(objective=tk.Objective.grpo(kl_coef=0.1))
    with pytest.raises(ValueError, match=r"what takes two passes; got top_entropy_quantile=0.3"):
        build(objective=tk.Objective.grpo(), top_entropy_quantile=0.3)


# The rollouts themselves, without a trainer ------------------------------------------------------------------


def test_micro_groups_are_guided_while_the_mean_reward_is_low():
    plan = schedule([2, 1, 1], [0.0, 0.5, 1.0], [NEVER, 0.5, 0.9])
    trace = Trace(tuple(range(100, 110)), ())
    asked = []

    def generate(prompts):
        asked.append(prompts)
        return [[7, 7] for _ in prompts], [[-0.5, -0.25] for _ in prompts]

    def score(rows, responses):  # the first prompt is easy, the second is never solved
        return [1.0 if row < 4 else 0.0 for row in rows]

    found = draw_guided(
        plan, [[1]] * 4 + [[2]] * 4, [[trace]] * 8, generate=generate, score=score, max_tokens=11, rng=random.Random(0)
    )
    assert found.prefix_lengths == [0, 0, 0, 0, 0, 0, 5, 10]
    assert found.responses[6] == [100, 101, 102, 103, 104, 7, 7]
    assert found.responses[7] == list(range(100, 110))
    assert asked[1] == [[1], [2, 100, 101, 102, 103, 104]]
    assert asked[2] == [[1]]  # the whole trace has nothing to generate
    assert found.supervised == [False] * 6 + [True, True]
    assert found.logprobs[0] == [-0.5, -0.25]
    assert [math.isnan(x) for x in found.logprobs[6]] == [True] * 5 + [False] * 2
    assert sorted(found.order) == list(range(8))


def test_a_response_keeps_to_the_limit_prefix_included():
    plan = schedule([1], [0.5], [ALWAYS])
    trace = Trace(tuple(range(20)), ())
    found = draw_guided(
        plan, [[1]], [[trace]], generate=lambda prompts: ([[9] * 8], None), score=lambda rows, r: [0.0], max_tokens=12,
        rng=random.Random(0),
    )  # fmt: skip
    assert found.responses == [[*range(10), 9, 9]]
    assert found.logprobs is None
