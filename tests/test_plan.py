"""The plan's arithmetic against real runs of the same model."""

import dataclasses

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import trapo_kernels as tk
from trapo.cli import app, plan_of
from trapo.config import load_config, merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.errors import TrapoError
from trapo.models.gpus import Gpu, engine_verdict, rows
from trapo.models.loading import load_model
from trapo.models.plan import OURS, _saved_by, fake_ranks, meta_model, saved_bytes, tables
from trapo.models.plan_around import kv_bytes, sync_traffic
from trapo.models.sharding import shard
from trapo.models.weights import full_weights
from trapo.rollouts import Rollout
from trapo.trainer import make_learner

PROMPT, RESPONSE = 5, 11


def config(path, *overrides):
    """A step of 2 prompts with 3 rollouts each, in one micro-batch."""
    settings = {
        "model": {"path": str(path)},
        "data": {"max_prompt_tokens": PROMPT},
        "rollout": {"max_response_tokens": RESPONSE},
        "guidance": {"sizes": [3], "ratios": [0], "thresholds": [-1]},
        "mode": "trapo",
        "train": {"prompts_per_step": 2, "micro_batch_tokens": 2 * 3 * (PROMPT + RESPONSE)},
    }
    return merge_config(settings, overrides)


def rollouts():
    """What such a step can hold at most. The last token is not fed in, so the prompt has one more."""
    problem = EncodedProblem(
        Problem("p", ({"role": "user", "content": "?"},), "1", (), "t"), tuple(range(8, 9 + PROMPT)), ()
    )
    own = tuple(range(20, 20 + RESPONSE))
    return [Rollout(problem, i // 3, 0, 0.0, (), own, False, True, 1.0, "ok", 0.5 - i) for i in range(6)]


@pytest.mark.parametrize("name", [pytest.param("smollm2", marks=pytest.mark.slow), "tiny", "tiny, adapted"])
def test_bytes_of_weights_gradients_and_optimizer_are_those_of_a_real_run(name, tiny_model_path):
    overrides = ["lora.rank=4"] if "adapted" in name else []
    if overrides:
        pytest.importorskip("peft")
    settings = config("smollm2-135m-instruct" if name == "smollm2" else tiny_model_path, *overrides)
    plan = plan_of(settings, 1)
    model, _ = load_model(settings.model)
    if overrides:
        from trapo.models import lora

        lora.attach(model, settings.lora, base="", seed=0)
    learner = make_learner(settings, model, pad_id=2)
    for p in learner.parameters:
        p.grad = torch.zeros_like(p)
    measured = {"weights": list(model.parameters()), "gradients": [p.grad for p in learner.parameters]}
    learner.optimizer.step()
    measured["optimizer"] = [v for state in learner.optimizer.state.values() for v in state.values()]
    for part, tensors in measured.items():
        assert plan.memory[part] == sum(t.numel() * t.element_size() for t in tensors), part
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.trained == sum(p.numel() for p in learner.parameters)


@pytest.mark.parametrize("overrides", [[], ["model.freeze=embed_tokens"], ["model.gradient_checkpointing=true"]])
def test_flops_are_those_that_torch_counts_in_a_real_update(overrides, tiny_model_path):
    settings = config(tiny_model_path, "model.attention=eager", "train.share_prefixes=never", *overrides)
    model, _ = load_model(settings.model)
    learner = make_learner(settings, model, pad_id=2)
    tk.set_backend("reference")  # whose products are torch's; the streamed ones do as many
    try:
        with FlopCounterMode(display=False) as counter:
            update = learner.update(rollouts(), tk.Objective.trapo(), seed=0)
    finally:
        tk.set_backend(None)
    # Once in many runs torch counted none: this says whether nothing was trained, or nothing was counted.
    assert (update.optimizer_steps, update.trained_tokens) == (1, 6 * (PROMPT + 1 + RESPONSE)), update
    assert counter.get_total_flops() > 0, counter.get_flop_counts()
    # Rotary embeddings multiply a few matrices too, of the size of positions × half a head.
    rotary = counter.get_total_flops() * 0.005
    assert plan_of(settings, 1).flops.total == pytest.approx(counter.get_total_flops(), abs=rotary)


@pytest.mark.parametrize(
    ("overrides", "saved"),
    [([], True), (["train.micro_batch_tokens=30"], True), (["train.micro_batch_tokens=24"], False)],
)
def test_tokens_with_shared_prompts_are_those_of_a_real_update(overrides, saved, tiny_model_path, monkeypatch):
    settings = config(tiny_model_path, *overrides)
    model, _ = load_model(settings.model)
    learner = make_learner(settings, model, pad_id=2)
    made, make = [], learner._batch
    monkeypatch.setattr(learner, "_batch", lambda group: made.append(make(group)) or made[-1])
    sample = []
    for i, rollout in enumerate(rollouts()):
        # Each prompt is its own; a token of context is not in the loss, and what is fed in is as long as can be.
        ids = tuple(100 * rollout.group + id for id in range(8, 8 + PROMPT))
        problem = dataclasses.replace(rollout.problem, prompt_ids=ids)
        sample.append(dataclasses.replace(rollout, problem=problem, prefix_ids=(50 + i,)))
    assert learner.update(sample, tk.Objective.trapo(), seed=0).optimizer_steps == 1
    plan = plan_of(settings, 1)
    assert plan.shared == sum(batch.input_ids.numel() for batch in made)
    assert (plan.shared < plan.step.through_model) == saved
    assert plan.tokens["tokens through the model, prompts shared"] == plan.shared


@pytest.mark.parametrize(
    "overrides",
    [["train.share_prefixes=never"], ["train.packing=always"], ["model.attention=fastest"]],
)
def test_what_shares_nothing_has_no_such_number(overrides, tiny_model_path):
    assert plan_of(config(tiny_model_path, *overrides), 1).shared is None


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        (("mode=distill", "distill.teacher={}", "distill.dtype=bfloat16"), torch.bfloat16),
        (("mode=self_distill", "distill.teacher=initial"), torch.float32),
        (("mode=self_distill", "distill.teacher=current"), None),
        (("mode=distill", "distill.teacher=http://localhost:8000"), None),
    ],
)
def test_a_teacher_of_its_own_weights_is_in_the_plan(keys, dtype, tiny_model_path):
    alone, frozen = config(tiny_model_path, "model.dtype=float32"), ["model.dtype=float32"]
    keys = [key.format(tiny_model_path) for key in keys]
    settings = merge_config({"model": {"path": str(tiny_model_path)}, "rollout": {"max_response_tokens": RESPONSE}},
                            [*frozen, *keys])  # fmt: skip
    found, before = plan_of(settings, 1).memory, plan_of(alone, 1).memory
    assert "teacher's weights" not in before
    size = sum(p.numel() for p in meta_model(settings.model, settings.lora).parameters())
    assert found.get("teacher's weights") == (None if dtype is None else size * dtype.itemsize)
    shared = plan_of(settings, 2).memory
    assert ("teacher's gathered weights" in shared) == (dtype is not None)
    if dtype is not None:
        assert found["teacher's weights"] / 2 <= shared["teacher's weights"] < 0.6 * found["teacher's weights"]


def test_saved_activations_are_those_of_a_real_forward():
    """On the CPU, where transformers repeats the keys and values of grouped heads; none are grouped here."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    architecture = LlamaConfig(vocab_size=97, num_key_value_heads=4, **sizes)
    model = LlamaForCausalLM(architecture).train()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    real = saved_bytes(model, lambda: model.get_decoder()(input_ids=ids, use_cache=False))
    with torch.device("meta"):
        planned = _saved_by(AutoModelForCausalLM.from_config(architecture).train(), 64)
    assert planned == pytest.approx(real, rel=0.02)


@pytest.fixture(scope="module")
def official():
    return plan_of(load_config("presets/qwen2.5-math-7b.yaml"), 8)


def test_the_official_recipe_passes_a_dry_run_on_8_ranks(official):
    assert official.parameters == 7_615_616_512  # Qwen2.5-Math-7B's
    # Every dimension of every weight divides by 8, so a rank's part is an eighth to the byte.
    assert official.memory["weights"] == official.parameters * 4 // 8
    assert official.memory["gradients"] == official.memory["weights"]
    assert all(w.shard == (w.shape[0] // 8, *w.shape[1:]) for w in official.weights)
    assert official.tokens == {
        "sequences": 64,
        "longest sequence": 9216,
        "tokens through the model": 64 * 9216,
        "tokens in the loss": 64 * 8192,
    }
    assert official.logits["fp32 logits and their gradient"] == 2 * 18432 * 152064 * 4
    assert official.logits[OURS] == tk.get_budget_mb("cuda") * 2**20


def test_the_7b_architecture_has_the_published_shapes(official):
    shapes = {w.name: (w.count, w.shape) for w in official.weights}
    assert shapes["lm_head.weight"] == (1, (152064, 3584))
    assert shapes["model.layers.*.self_attn.k_proj.weight"] == (28, (512, 3584))
    assert shapes["model.layers.*.mlp.down_proj.weight"] == (28, (3584, 18944))


def test_no_process_group_is_left_behind(official):
    import torch.distributed as dist

    assert not dist.is_initialized()


def test_shorter_responses_cost_less(official):
    plan = plan_of(load_config("qwen2.5-math-7b"), 8, response_tokens=1024)
    assert plan.tokens["tokens in the loss"] == 64 * 1024
    assert plan.flops.total < official.flops.total / 4


def test_the_tables_show_every_part(official):
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(official):
        console.print(table)
    text = console.export_text()
    for part in (
        *official.memory,
        *official.logits,
        *official.tokens,
        *official.engine,
        *official.host,
        "lm_head.weight",
        "152064 × 3584",
    ):
        assert part in text


def test_the_command_prints_them(tiny_model_path):
    result = CliRunner().invoke(app, ["plan", "demo", f"model.path={tiny_model_path}", "--ranks", "2"])
    assert result.exit_code == 0, result.output
    assert "embed_tokens" in result.output
    assert "activations" in result.output


def test_a_model_that_nobody_knows_is_refused(tmp_path):
    for path, said in ((tmp_path, "no architecture"), (tmp_path / "typo", "cannot load .*: no such folder")):
        unknown = config(path)
        with pytest.raises(TrapoError, match=rf"model\.path: {said}"):
            meta_model(unknown.model, unknown.lora)


# What is around an update -------------------------------------------------------------------------------------------


def test_keys_and_values_are_those_that_a_real_forward_leaves(tiny_model_path):
    model, _ = load_model(config(tiny_model_path).model)
    cache = model(torch.arange(3, 20)[None], use_cache=True).past_key_values
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert kv_bytes(model, torch.float32) * 17 == held


def test_a_sync_moves_what_real_gathers_are_given(tiny_model_path):
    """Counted of the very collectives, over a process group in which nobody else is there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    received = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if "all_gather_into_tensor" in str(func):
                received.append(found.nbytes * 3 // 4)  # a quarter is its own
            return found

    settings = config(tiny_model_path)
    model, _ = load_model(settings.model)
    weights = sum(p.nbytes for p in model.parameters())
    with fake_ranks(4) as mesh:
        shard(model, mesh, "float32")
        with Counted():
            for _ in full_weights(model):
                pass
    vllm = merge_config({}, ["rollout.engine=vllm_server", "rollout.server_url=http://x:1"]).rollout
    planned = sync_traffic(meta_model(settings.model, settings.lora), vllm, "float32", 4)
    # Rows that do not divide by four are filled up.
    assert planned["to each rank, from the others"] == pytest.approx(sum(received), rel=0.01)
    assert planned["to the server, through the file system"] == weights


def test_an_engine_takes_what_is_said_of_it(tiny_model_path):
    plan = plan_of(config(tiny_model_path, "rollout.engine=vllm", "rollout.dtype=bfloat16", "rollout.batch_size=2"), 1)
    (learner, weights, cache) = plan.engine.values()
    assert learner == plan.memory["weights"] + plan.memory["optimizer"]
    assert weights == 2 * plan.parameters
    assert cache == 2 * (PROMPT + RESPONSE) * plan.kv_bytes
    with_kl = plan_of(config(tiny_model_path, "objective.kl_coef=0.1"), 1)
    assert with_kl.memory["first weights, frozen"] == with_kl.memory["weights"]
    assert list(plan_of(config(tiny_model_path, "rollout.engine=hf"), 1).engine.values())[1] == 0  # the learner's own
    served = ["rollout.engine=vllm_server", "rollout.server_url=http://x:1"]
    assert len(plan_of(config(tiny_model_path, *served), 1).engine) == 1


@pytest.mark.parametrize(
    ("gib", "said"),
    [
        (80, "yes: 32.0 of 80 GiB are the engine's"),
        (41, "yes: 16.4 of 41 GiB are the engine's, with room for"),
        (30, "no: the engine's weights take 14.2 of its 12.0 GiB"),
    ],
)
def test_what_does_not_fit_is_said(official, gib, said):
    assert engine_verdict(official, Gpu("x", gib, 1, 1)).startswith(said)
    by_name = dict(rows(official, Gpu("x", gib, 1, 1), 29))
    assert by_name["loading fits into the machine's memory"] == "no: 30.4 of 29 GiB"
    assert "loading fits into the machine's memory" not in dict(rows(official, Gpu("x", gib, 1, 1)))
    small = dataclasses.replace(official, engine={**official.engine, "the learner's weights and optimizer": 70 * 2**30})
    assert engine_verdict(small, Gpu("x", 80, 1, 1)).startswith("no: the learner's 70.0 GiB and the engine's 32.0")
