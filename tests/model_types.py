"""A tiny model of any causal type that transformers lists, and what the trainer makes of it."""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import trapo_kernels as tk
from trapo.config import LoraConfig, merge_config
from trapo.data.encode import EncodedProblem
from trapo.data.problem import Problem
from trapo.engines.hf import HFEngine
from trapo.engines.protocol import Request
from trapo.errors import TrapoError
from trapo.learner import Learner
from trapo.models import lora, weights
from trapo.models.checkpointing import enable_checkpointing
from trapo.rollouts import Rollout
from trapo.trainer import make_learner

VOCABULARY = 128
# Every size that configurations know; each takes those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "model_dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("hidden_dim", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "n_inner", "ffn_hidden_size", "d_inner"), 64),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size", "shared_intermediate_size"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "attention_head_size", "dim_head", "global_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    "sliding_window": 8,
    # State-space and linear attention layers.
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "mamba_n_groups": 1,
    "n_groups": 1,
    "lru_width": 32,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
}


def causal_types() -> list[str]:
    """Every type that transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# What a type needs beyond SMALL: shapes that its configuration ties together. None: leave that one alone.
MLA = {"num_key_value_heads": 4}  # heads share a latent, not keys
ROTARY, NO_HEAD_DIM, UNPADDED = {"rotary_dim": 4}, {"head_dim": None}, {"unpadded_vocab_size": VOCABULARY}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA
    ),
    **dict.fromkeys(
        ("dots3_note_text", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), MLA
    ),
    **dict.fromkeys(("codegen", "gptj"), ROTARY),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), NO_HEAD_DIM),
    "bamba": {"attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    **dict.fromkeys(("inkling_text", "inkling2_text", "inkling2_loop_text"), UNPADDED),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": ROPE}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xlstm": {
        "qk_head_dim": None,
        "v_head_dim": None,
        "head_dim": None,
        "hidden_size": 64,
        "qk_dim_factor": 1.0,
        "chunk_size": 16,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    **dict.fromkeys(("zamba", "zamba2"), ZAMBA),
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """A small configuration of a type; `settings` win."""
    default = CONFIG_MAPPING[kind]()
    return type(default)(**_small(default, {**SPECIAL.get(kind, {}), **settings}))


def _small(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration: its sizes, and those of the configurations in it."""
    kind = type(config)
    chosen = {n: v for n, v in {**SMALL, **settings}.items() if n in settings or _has(config, n)}
    chosen = {n: v for n, v in chosen.items() if v is not None}
    layer_types = vars(config).get("layer_types")
    if layer_types and "layer_types" not in chosen:
        kinds = list(dict.fromkeys(layer_types))
        chosen["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in chosen:
                chosen[name] = len(chosen["layer_types"])
    for name in kind.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            special = SPECIAL.get(inner.model_type, {}) if inner.model_type != config.model_type else {}
            chosen[name] = {"model_type": inner.model_type, **_small(inner, special), **settings.get(name, {})}
    return chosen


def _has(config: Any, name: str) -> bool:
    """Whether a size is one of a configuration's own, and can be given."""
    name = getattr(config, "attribute_map", {}).get(name, name)
    found = getattr(type(config), name, None)
    if isinstance(found, property) and found.fset is None:
        return False
    return name in vars(config)


def tiny_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """In evaluation mode, with weights five times as large as usual, so that what differs does so by much."""
    config = tiny_config(kind, **settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > 20_000_000:
        raise MemoryError(f"{size / 1e6:.0f} M parameters with the sizes that are known")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


# --- what the trainer makes of a type, and whether that is right -----------------------------------------------------

COLUMNS = ("trains", "packs", "shares", "checkpointing", "rollouts", "LoRA")


def record(kind: str, work: Path) -> dict[str, str]:
    """One row of docs/models.md. A cell that begins with WRONG is a disagreement that nothing noticed."""
    try:
        model = tiny_model(kind)
    except Exception as error:
        return {"trains": f"cannot be built here: {first_line(error)}"}
    try:
        row = {"trains": trained(model)}
    except TrapoError as error:
        return {"trains": f"refused: {number(error)}"}
    for column, check in (
        ("packs", packed),
        ("shares", shared),
        ("checkpointing", checkpointed),
        ("rollouts", generated),
        ("LoRA", merged),
    ):
        try:
            row[column] = check(tiny_model(kind), work)
        except TrapoError as error:
            row[column] = f"refused: {number(error)}"
        except Exception as error:
            row[column] = f"WRONG: {type(error).__name__}: {first_line(error)}"
    return row


def first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return text.replace("|", "/")[:110]


def number(error: Exception) -> str:
    """The reason of a refusal, without the names that the row has."""
    text = str(error)
    for words, reason in (
        ("output head with bias", "logits are not the head's"),
        ("fails on a short text", "its forward fails on a short text"),
        ("no token sees later", "tokens see later ones"),
        ("must be nn.Linear", "the head is not linear"),
        ("has none; accepted", "has none"),
        ("with it the hidden states", "changes hidden states"),
        ("adapters merged", "merged is another model"),
        ("cannot generate", "cannot generate"),
    ):
        if words in text:
            size = re.search(r"by ([0-9.e+-]+) of", text)
            return reason + (f" ({size[1]})" if size else "")
    return first_line(error)


def learner(model: Any, *overrides: str) -> Learner:
    return make_learner(merge_config({}, ["rollout.temperature=1.0", *overrides]), model, pad_id=1)


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(10, 60, (n,), generator=generator).tolist() for n in lengths]


def rollout(ids: list[int]) -> Rollout:
    problem = EncodedProblem(Problem("0", ({"role": "user", "content": "?"},), "1", (), "test"), tuple(ids[:3]), ())
    return Rollout(problem, 0, 0, 0.0, (), tuple(ids[3:]), False, True, 1.0, "ok", advantage=1.0)


def own_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """By the model's own logits of one sequence, in float32: what everything must agree with."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[2:-1].gather(-1, torch.tensor(ids[3:])[:, None])[:, 0]


def off(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def verdict(error: float, right: str, bound: float = 1e-3) -> str:
    return right if error <= bound else f"WRONG by {error:.2g}"


LONG = texts(7, 21, 33)  # past a window of 8 and several chunks


def trained(model: Any) -> str:
    made = learner(model, "train.packing=never", "train.micro_batch_tokens=1000")
    found = made.own_logprobs([rollout(ids) for ids in LONG])
    return verdict(off(found, [own_logprobs(model, ids) for ids in LONG]), "yes")


def packed(model: Any, work: Path) -> str:
    made = learner(model, "train.packing=always", "train.micro_batch_tokens=1000")
    found = made.own_logprobs([rollout(ids) for ids in LONG])
    return verdict(off(found, [own_logprobs(model, ids) for ids in LONG]), "yes" if made.packed else "padded instead")


def shared(model: Any, work: Path) -> str:
    """Of texts past the window and of shorter ones, which a tree takes in any case."""
    made, kinds = learner(model, "train.micro_batch_tokens=1000"), set()
    for long in (33, 7):
        first, second = texts(long, long)
        branched = [first, [*first[: long - 3], *second[-4:]], [*first[:3], *second[3:]]]
        sample = [rollout(ids) for ids in branched]
        kinds.add(any(group.trees for group in made._micro_batches(sample)))
        if error := verdict(off(made.own_logprobs(sample), [own_logprobs(model, ids) for ids in branched]), ""):
            return error
    return {(True,): "yes", (False,): "anew", (False, True): "within the window"}[tuple(sorted(kinds))]


def gradients(model: Any, *overrides: str) -> torch.Tensor:
    made = learner(model, *overrides, "train.packing=never")
    made._step = lambda loss, region: 0.0
    made.update([rollout(ids) for ids in LONG], tk.Objective.grpo(), seed=0)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).detach()


def checkpointed(model: Any, work: Path) -> str:
    plain, other = copy.deepcopy(model), model
    enable_checkpointing(other)
    found = gradients(other, "model.gradient_checkpointing=true")
    expected = gradients(plain)
    return verdict(float((found - expected).norm() / expected.norm()), "yes")


def generated(model: Any, work: Path) -> str:
    engine = HFEngine(model, eos_ids=[], pad_id=1)
    contexts = texts(5, 12, 19)
    asked = [Request(tuple(context), 6) for context in contexts for _ in range(2)]
    worst = 0.0
    for request, completion in zip(asked, engine.generate(asked, temperature=0.0, seed=0), strict=True):
        ids = torch.tensor([[*request.context, *completion.token_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(request.context) - 1 : -1].float()
        chosen = logits.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, float((logits.amax(-1) - chosen).max() / logits.abs().max()))
    return verdict(worst, str(engine.way) or "yes")


def merged(model: Any, work: Path) -> str:
    lora.attach(model, LoraConfig(rank=2, alpha=8.0), base="", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    weights.writer(model, NoTokenizer(), final=True)(work)
    again = type(model).from_pretrained(work, dtype=torch.float32)
    error = off([own_logprobs(again, ids) for ids in LONG], [own_logprobs(model, ids) for ids in LONG])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    effect = off([own_logprobs(again, LONG[0])], [own_logprobs(model, LONG[0])])
    return verdict(error, "yes" if effect > 1e-5 else "no effect", bound=min(1e-3, effect / 20))


class NoTokenizer:
    def save_pretrained(self, path: Path) -> None:
        pass


HEADER = """# Models

What the trainer makes of each of the {count} types of causal language model that transformers {version} lists, with a
tiny model of random weights on a CPU, by `python tests/model_types.py`. A cell is held against the model's own forward
of each sequence alone; no cell is wrong in silence, or the slow test of the same checks (`make test-slow`) fails.

- *trains*: the fused loss's log-probabilities are those of the model's own logits. Refused: a transform between decoder
  and head (encoders), or tokens that see later ones.
- *packs*: `train.packing: always`. "padded instead": the layers do not keep sequences apart here, so they are padded,
  which is said once. Some do with `causal_conv1d` and `flash-linear-attention` installed, which need a GPU.
- *shares*: `train.share_prefixes: auto`. "anew": each rollout's prompt is computed anew; "within the window": where no
  rollout is longer than the layers' attention window.
- *checkpointing*: `model.gradient_checkpointing: true` gives the same gradients.
- *rollouts*: engine hf generates as forwards without a cache do; the words say with which loop, if not our own, and
  what it goes without for that.
- *LoRA*: `lora.rank` with the default targets; the merged model on disk computes what the live one does.

| type | trains | packs | shares | checkpointing | rollouts | LoRA |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table(rows: dict[str, dict[str, str]]) -> str:
    """docs/models.md of the rows."""
    lines = [f"| {kind} | {' | '.join(row.get(name, '') for name in COLUMNS)} |" for kind, row in rows.items()]
    return HEADER.format(count=len(rows), version=transformers.__version__) + "\n".join(lines) + "\n"


def main() -> None:
    """Writes docs/models.md, or prints the rows of the types that are named."""
    rows = {}
    for kind in sys.argv[1:] or causal_types():
        with tempfile.TemporaryDirectory() as work:
            rows[kind] = record(kind, Path(work))
        print(kind, rows[kind], flush=True)
    if not sys.argv[1:]:
        (Path(__file__).parents[1] / "docs" / "models.md").write_text(table(rows))


if __name__ == "__main__":
    main()
