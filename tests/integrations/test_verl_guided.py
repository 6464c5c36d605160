"""A step of TRAPO by verl's own code: its configuration, agent loop, engine, advantages and loss, all but Ray, FSDP and
the server that generates."""

from __future__ import annotations

import asyncio
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here: `make test-verl` runs this in a venv of its own")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import verl
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from verl.models.transformers import monkey_patch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.trainer.ppo.v1 import agent_loop_tq
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers import engine_workers
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.rollout.replica import TokenOutput
    from verl.workers.utils.padding import response_from_nested

    from trapo.integrations.verl import GuidedAgentLoop
    from trapo_kernels.integrations import verl as ours

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = ["<eos>", "easy", "hard", "good", "bad", "one", "two", "three", "four", "five", "six", "seven", "eight"]
TRACE = "one two three four five six seven eight good"
GUIDED = """
- name: trapo
  _target_: trapo.integrations.verl.GuidedAgentLoop
  guidance: {sizes: [2, 1, 1], ratios: [0.0, 0.5, 1.0], thresholds: [-1, 0.5, 0.9]}
"""
REWARD = (
    "def score(data_source, solution_str, ground_truth, extra_info=None):\n    return float(' good' in solution_str)\n"
)
# The keys of docs/recipes/verl.md; tests/test_docs.py does not run them.
KEYS = [
    "actor_rollout_ref.actor.policy_loss.loss_mode=trapo", "actor_rollout_ref.actor.clip_ratio_high=0.28",
    "actor_rollout_ref.actor.entropy_coeff=0.001", "actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.model.use_fused_kernels=True",
    "actor_rollout_ref.model.fused_kernel_options.impl_backend=trapo", "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.calculate_log_probs=False",
    "actor_rollout_ref.rollout.agent.default_agent_loop=trapo", "algorithm.adv_estimator=grpo",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", chat_template=template
    )  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "guided.yaml").write_text(GUIDED)
    (tmp_path / "reward.py").write_text(REWARD)
    keys = [
        *KEYS, f"actor_rollout_ref.rollout.agent.agent_loop_config_path={tmp_path}/guided.yaml",
        f"reward.custom_reward_function.path={tmp_path}/reward.py", "reward.custom_reward_function.name=score",
        "data.max_prompt_length=4", "data.max_response_length=12", "actor_rollout_ref.model.path=nowhere",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    ]  # fmt: skip
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", keys)


class Server:
    """Answers "good" to what is easy, "bad" to what is hard, three words in all."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
        await asyncio.sleep(0)
        text = self.tokenizer.decode(prompt_ids)
        self.asked.append((text, sampling_params["max_tokens"]))
        answer = "two good <eos>" if text.startswith("easy") else "two bad <eos>"
        extra = {"min_global_steps": 7, "max_global_steps": 7}
        return TokenOutput(token_ids=self.tokenizer(answer)["input_ids"], num_preempted=0, extra_fields=extra)


@pytest.fixture
def worker(config, tokenizer, monkeypatch):
    """verl's worker of agent loops, as its constructor leaves it but for the model's files."""
    kept, states = [], []

    async def put(key, partition_id, tag):
        states.append((key, tag["status"]))

    async def batch_put(keys, fields, tags, partition_id):
        kept.append((keys[0], fields, tags[0], partition_id))

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_put", put)
    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", batch_put)
    monkeypatch.setattr(GuidedAgentLoop, "rewards", None)
    kind = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    made = kind.__new__(kind)
    made.config, made.llm_client, made.tokenizer, made.processor = config, Server(tokenizer), tokenizer, None
    made.hf_model_type, made.tools, made.reward_loop_worker_handles = "llama", [], None
    made.distillation_enabled, made.mm_processor_kwargs = False, {}
    made.dataset_cls = None
    for each in OmegaConf.load(config.actor_rollout_ref.rollout.agent.agent_loop_config_path):
        monkeypatch.setitem(
            agent_loop_tq.AgentLoopWorker._run_agent_loop.__globals__["_agent_loop_registry"], each.name, each
        )
    made.kept, made.states = kept, states
    return made


def draw(worker, *prompts, validate=False, temperature=1.0):
    async def every():
        rows = []
        for uid, (text, trace) in enumerate(prompts):
            row = {
                "uid": f"p{uid}", "raw_prompt": [{"role": "user", "content": text}], "expert_trace": trace,
                "data_source": "words", "reward_model": {"ground_truth": "good"}, "extra_info": {}, "global_steps": 7,
                "agent_name": "trapo", "index": uid,
            }  # fmt: skip
            sampling = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "logprobs": False}
            info = {"validate": validate, "step": 7, "sample_index": uid, "rollout_n": 0}
            rows.append(worker._run_prompt(row, sampling, info))
        await asyncio.gather(*rows)

    GuidedAgentLoop.rewards = None  # its manager keeps the event loop that it was made in
    asyncio.run(every())
    return sorted(worker.kept, key=lambda each: each[0])


def test_micro_groups_wait_for_the_rewards_of_earlier_ones(worker, tokenizer):
    kept = draw(worker, ("easy", TRACE), ("hard", TRACE))
    assert {status for _, status in worker.states} == {"running", "finished"}
    found = {key: fields[0] for key, fields, *_ in kept}
    texts = {key: tokenizer.decode(fields["responses"]) for key, fields in found.items()}
    assert [texts[f"p0_{i}_0"] for i in range(4)] == ["two good <eos>"] * 4  # a mean of 1 is not below 0.9
    assert [texts[f"p1_{i}_0"] for i in range(2)] == ["two bad <eos>"] * 2
    assert texts["p1_2_0"] == "one two three four five two bad <eos>"  # half of ten tokens, the end included
    assert texts["p1_3_0"] == f"{TRACE} <eos>"  # the whole trace, nothing generated
    masks = {key: fields["expert_mask"].tolist() for key, fields in found.items()}
    assert not any(sum(masks[key]) for key in masks if key not in ("p1_2_0", "p1_3_0"))
    assert masks["p1_2_0"] == [1] * 5 + [0] * 3
    assert masks["p1_3_0"] == [1] * 10
    for fields in found.values():
        assert fields["response_mask"].tolist() == [1] * len(fields["responses"])
    assert [found[f"p1_{i}_0"]["rm_scores"][-1].item() for i in range(4)] == [0.0, 0.0, 0.0, 1.0]
    assert {tag["min_global_steps"] for *_, tag, _ in kept} == {7}  # of a rollout that nothing was generated for, too
    assert ("hard one two three four five", 12 - 5) in worker.llm_client.asked
    assert not GuidedAgentLoop.groups


def test_rows_without_a_trace_and_rows_of_a_validation_are_not_guided(worker):
    for fields in [each[1][0] for each in draw(worker, ("hard", None), ("hard", ""), ("hard", []))]:
        assert not fields["expert_mask"].any()
        assert len(fields["responses"]) == 3
    worker.kept.clear()
    worker.config.actor_rollout_ref.rollout.val_kwargs.n = 1
    (found,) = draw(worker, ("hard", TRACE), validate=True, temperature=0)
    assert found[3] == "val"
    assert not found[1][0]["expert_mask"].any()
    assert not GuidedAgentLoop.groups


def test_a_prefix_that_carries_no_term_is_not_learnt_from(worker):
    registry = agent_loop_tq.AgentLoopWorker._run_agent_loop.__globals__["_agent_loop_registry"]
    registry["trapo"]["guidance"]["supervise"] = "none"
    fields = {key: fields[0] for key, fields, *_ in draw(worker, ("hard", TRACE))}["p0_2_0"]
    assert fields["response_mask"].tolist() == [0] * 5 + [1] * 3
    assert not fields["expert_mask"].any()


def test_a_rollout_that_fails_keeps_nobody_waiting(worker):
    async def generate(request_id, *, prompt_ids, **_):
        raise OSError("server is gone")

    worker.llm_client.generate = generate
    assert draw(worker, ("hard", TRACE)) == []
    assert worker.states[-1] == ("p0", "failure")
    assert not GuidedAgentLoop.groups


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("actor_rollout_ref.rollout.n", 8, r"rollout.n must be 4, the sum of guidance sizes; got 8"),
        ("actor_rollout_ref.rollout.calculate_log_probs", True, r"calculate_log_probs must be False, for the engine"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(worker, key, value, message, caplog):
    OmegaConf.update(worker.config, key, value)
    assert draw(worker, ("hard", TRACE)) == []
    assert worker.states[-1] == ("p0", "failure")
    assert re.search(message, caplog.text)


# The update ----------------------------------------------------------------------------------------------------


def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )  # fmt: skip


@pytest.fixture
def engine(monkeypatch):
    """verl's FSDP engine around a model without FSDP."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # verl patches the class
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)  # it wants an older one than is installed here
    made = FSDPEngineWithLMHead.__new__(FSDPEngineWithLMHead)
    made.module, made.use_ulysses_sp, made.pad_to_length = make_model(), False, None
    made.engine_config = OmegaConf.create({"entropy_checkpointing": False, "entropy_from_logits_with_chunking": False})
    from verl.utils.torch_functional import entropy_from_logits

    made.compute_entropy_from_logits = entropy_from_logits
    return made


def batch_of(kept, **settings):
    rows = TensorDict.maybe_dense_stack([fields[0] for _, fields, *_ in kept])
    names = ("input_ids", "position_ids", "prompts", "responses", "response_mask", "expert_mask", "rm_scores")
    tensors = {
        name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged) for name in names
    }  # fmt: skip
    batch = TensorDict(tensors, batch_size=len(kept))
    shared = {"temperature": 1.0, "pad_mode": "no_padding", "dp_size": 1, "global_batch_size": len(kept)}
    tokens = int(batch["response_mask"].values().sum())
    tu.assign_non_tensor(batch, **shared, batch_num_tokens=tokens, **settings)
    return batch


def outputs_of(engine, batch):
    inputs, given = engine.prepare_model_inputs(batch)
    return engine.prepare_model_outputs(engine.module(**inputs, use_cache=False), given, batch, None)


@pytest.mark.parametrize("packed", [True, False])
def test_the_head_gives_what_verls_logits_give_with_sum_of_squares(packed, engine, worker):
    kept = draw(worker, ("easy", TRACE), ("hard", TRACE))
    settings = {"use_remove_padding": packed, "calculate_entropy": True, "calculate_sum_pi_squared": True}
    with torch.no_grad():
        expected = outputs_of(engine, batch_of(kept, use_fused_kernels=False, **settings))
        monkey_patch.apply_monkey_patch(
            engine.module, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="trapo"
        )
        found = outputs_of(engine, batch_of(kept, use_fused_kernels=True, **settings))
    assert found.keys() == expected.keys() == {"log_probs", "entropy", "sum_pi_squared"}
    mask = batch_of(kept)["response_mask"]
    for name in expected:  # what a sequence's last position would predict next is nothing
        theirs, own = (response_from_nested(outputs[name], mask).values() for outputs in (expected, found))
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_a_head_with_a_scale_has_it(engine, monkeypatch):
    from transformers import GraniteConfig, GraniteForCausalLM

    monkeypatch.setattr(GraniteForCausalLM, "forward", GraniteForCausalLM.forward)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=50, logits_scaling=3.0, **sizes, num_key_value_heads=2))
    ids = torch.randint(0, 50, (2, 6))
    expected = model(ids).logits.log_softmax(-1).gather(-1, torch.roll(ids, -1, -1)[..., None]).squeeze(-1)
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="trapo")
    found = model(ids, return_dict=True, temperature=1.0).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_whole_update_is_trapos(config, engine, worker):
    """Rollouts, the engine's forward, verl's advantages and its loss function, and the gradients of all of it."""
    kept = draw(worker, ("hard", TRACE))
    model = config.actor_rollout_ref.model
    monkey_patch.apply_monkey_patch(
        engine.module, use_remove_padding=False, use_fused_kernels=model.use_fused_kernels,
        fused_kernels_backend=model.fused_kernel_options.impl_backend,
    )  # fmt: skip
    batch = batch_of(kept, use_fused_kernels=True, use_remove_padding=False, calculate_entropy=True)
    output = outputs_of(engine, batch)
    old = response_from_nested(output["log_probs"].detach(), batch["response_mask"])
    padded = {name: batch[name].to_padded_tensor(0) for name in ("rm_scores", "response_mask", "expert_mask")}
    mask = padded["response_mask"].bool()
    advantages, _ = compute_grpo_outcome_advantage(padded["rm_scores"], mask, index=[0] * 4)
    lengths = mask.sum(1).tolist()
    nested = [values[:n] for values, n in zip(advantages, lengths, strict=True)]
    batch["advantages"], batch["old_log_probs"] = torch.nested.as_nested_tensor(nested, layout=torch.jagged), old
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    loss, metrics = engine_workers.ppo_loss(actor, output, batch)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in engine.module.named_parameters()}

    plain = make_model()
    total = torch.zeros(())
    for i, (_, fields, *_) in enumerate(kept):
        row = fields[0]
        start = len(row["prompts"])
        log_pi = plain.lm_head(plain.model(row["input_ids"][None])[0]).log_softmax(-1)[0, start - 1 : -1]
        logp = log_pi.gather(-1, row["responses"][:, None]).squeeze(-1)
        p, ratio = logp.exp(), (logp - logp.detach()).exp()
        expert = torch.where(p >= 0.1, -logp, 1 - math.log(0.1) - p / 0.1)
        token = torch.where(row["expert_mask"].bool(), expert, -ratio * advantages[i, 0])
        total = total + (token + 0.001 * (log_pi.exp() * log_pi).sum(-1)).sum()
    (total / mask.sum()).backward()
    torch.testing.assert_close(loss.detach(), (total / mask.sum()).detach(), rtol=1e-5, atol=1e-6)
    largest = max(float(q.grad.abs().max()) for q in plain.parameters())
    for name, q in plain.named_parameters():
        assert float((grads[name] - q.grad).abs().max()) <= 1e-5 * largest, name
    assert {"actor/expert_loss", "actor/policy_loss", "actor/expert_prob"} <= metrics.keys()
    assert ours.ppo_loss is engine_workers.ppo_loss


def test_rows_that_fill_a_batch_up_change_nothing(config, engine, worker):
    """verl copies a row's other fields into rows of one token without loss: the expert mask is longer than the row."""
    kept = draw(worker, ("hard", TRACE))
    batch = batch_of(kept)
    lengths = [1, *batch["response_mask"].offsets().diff().tolist()[1:]]

    def cut(values):
        return torch.nested.as_nested_tensor(
            [v[:n] for v, n in zip(values.unbind(), lengths, strict=True)], layout=torch.jagged
        )

    found = []
    for width in (lengths[0], 10):
        rows = [torch.ones(width, dtype=torch.int64), *batch["expert_mask"].unbind()[1:]]
        mask = batch["response_mask"].clone()
        data = TensorDict(
            {
                "response_mask": cut(mask), "old_log_probs": cut(mask * -1.0), "advantages": cut(mask * 1.0),
                "expert_mask": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
                "prompts": batch["prompts"], "responses": cut(batch["responses"]),
            }, batch_size=4,
        )  # fmt: skip
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=20, global_batch_size=4)
        full = [torch.zeros(1 + n) - 0.5 for n in lengths]
        values = torch.nested.as_nested_tensor(full, layout=torch.jagged)
        output = {"log_probs": values, "entropy": -values}
        found.append(ours.ppo_loss(omega_conf_to_dataclass(config.actor_rollout_ref.actor), output, data)[0])
    assert found[0] == found[1]
