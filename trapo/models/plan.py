"""`trapo plan` says what a configuration needs on each rank, without its weights, without a GPU, without the other
ranks.

Shapes come from the real thing: the model is built on the `meta` device and sharded by FSDP2 over a mesh of
torch's fake process group. Activations come from a forward of the real model on meta tensors, whose saved tensors are
counted. FLOPs and the loss's part are arithmetic (`update_flops`, `loss_memory`), for each rollout in a row of its own:
of what `train.share_prefixes` saves the tokens are counted (plan_sharing.py). Nothing here is a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import trapo_kernels as tk
from trapo.config import PRESETS
from trapo.errors import TrapoError
from trapo.models import lora as adapters
from trapo.models import plan_around as around
from trapo.models.gpus import GPUS, Gpu, rows
from trapo.models.layers import attention_width
from trapo.models.loading import freeze
from trapo.models.plan_sharing import shared_tokens
from trapo.models.precision import resolve
from trapo.models.sharding import decoder_layers, shard
from trapo.settings.groups import LoraConfig, ModelConfig, RolloutConfig, TrainConfig

OURS = "ours: the loss's buffer"
SHARED = "tokens through the model, prompts shared"
ATTENTION = "trapo_plan"  # registered with transformers, for meta tensors alone


@dataclasses.dataclass(frozen=True)
class Weight:
    """Describes one kind of parameter: those of all layers that share a shape count as one line."""

    name: str  # a layer's number is *
    count: int
    shape: tuple[int, ...]
    shard: tuple[int, ...]  # on this rank
    trained: bool


@dataclasses.dataclass(frozen=True)
class Flops:
    """Counts the FLOPs of one step, over all ranks, as torch.utils.flop_counter does: 2 per multiply-add, matrix
    products alone."""

    decoder: float
    attention: float
    head: float
    recompute: float  # of gradient checkpointing

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.head + self.recompute


@dataclasses.dataclass(frozen=True)
class StepTokens:
    """Counts sequences and tokens of one step, at most: every prompt and response at its limit, or as long as asked."""

    sequences: int
    prompt: int
    response: int
    together: int = 1  # sequences of one prompt

    @property
    def longest(self) -> int:
        return self.prompt + self.response

    @property
    def through_model(self) -> int:
        return self.sequences * self.longest

    @property
    def in_loss(self) -> int:
        return self.sequences * self.response

    @property
    def named(self) -> dict[str, int]:
        """Returns the numbers with their names, for people."""
        return {
            "sequences": self.sequences,
            "longest sequence": self.longest,
            "tokens through the model": self.through_model,
            "tokens in the loss": self.in_loss,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what `trapo plan` prints. Bytes are per rank."""

    model: str
    ranks: int
    parameters: int
    trained: int
    weights: list[Weight]
    memory: dict[str, int]
    logits: dict[str, int]  # of one micro-batch: as ours, and as those hold them who materialise
    step: StepTokens
    flops: Flops
    kv_bytes: int = 0  # keys and values of a token in all layers, bfloat16
    host: dict[str, int] = dataclasses.field(default_factory=dict)  # of all ranks together, while they load
    engine: dict[str, int] = dataclasses.field(default_factory=dict)  # of a rank while it generates, the learner's too
    traffic: dict[str, int] = dataclasses.field(default_factory=dict)  # of one weight sync
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    shared: int | None = None  # tokens through the model where prompts are shared; None: they are not

    @property
    def tokens(self) -> dict[str, int]:
        """Returns the tokens of one step, at most, by name."""
        return self.step.named | ({} if self.shared is None else {SHARED: self.shared})


def make_plan(
    model: ModelConfig,
    lora: LoraConfig,
    train: TrainConfig,
    step: StepTokens,
    ranks: int,
    teacher: ModelConfig | None = None,
    rollout: RolloutConfig | None = None,
    references: int = 0,
) -> Plan:
    """Returns what steps of so many tokens need, beside a frozen `teacher`, of which the memory is counted and not the
    FLOPs. references: frozen copies of the model, counted likewise.

    Raises TrapoError when the model's architecture cannot be found or the configuration cannot be used.
    """
    precision, rollout = _precision(train), rollout or RolloutConfig()
    built = meta_model(model, lora)
    sizes = {"ranks": ranks, "sequences": step.sequences, "longest": step.longest}
    engine = around.engine_memory(built, rollout, precision, **sizes)
    host, traffic = around.host_memory(built, ranks), around.sync_traffic(built, rollout, precision, ranks)
    flops = update_flops(built, step, checkpointing=model.gradient_checkpointing)
    total = sum(p.numel() for p in built.parameters())
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    head = built.get_output_embeddings().weight
    head_trained, head_size = head.requires_grad, head.numel()
    of_prompt = {"prompts": step.sequences // step.together, "rollouts": step.together}
    tokens = shared_tokens(built, model, train, **of_prompt, lengths=(step.prompt, step.response))
    logits = loss_memory(train, built.config.get_text_config().vocab_size)
    with fake_ranks(ranks) as mesh:
        if mesh is not None:
            shard(built, mesh, precision)
        weights = _weights(built)
        memory = state_memory(built)
        frozen = {"first weights, frozen": references * memory["weights"]} if references else {}
        frozen |= {} if teacher is None else _teacher_memory(teacher, mesh, precision)
        own = {"the learner's weights and optimizer": memory["weights"] + memory["optimizer"]}
        resting = {name: value for name, value in frozen.items() if "gathered" not in name}
        engine = own | resting | engine  # in this order: `gpus.engine_verdict` takes it apart
        memory |= frozen | (_unit_memory(built, precision) if mesh is not None else {})
    memory |= _activations(model, lora, train, step.longest) | {"logits buffer of the loss": logits[OURS]}
    if head_trained and precision != "float32":
        memory["fp32 sum of the head's gradient"] = 4 * head_size
    kept = around.kv_bytes(built, torch.bfloat16)
    return Plan(
        model.path, ranks, total, trained, weights, memory, logits, step, flops, kept,
        host=host, engine=engine, traffic=traffic, rollout=rollout, shared=tokens,
    )  # fmt: skip


def _precision(train: TrainConfig) -> str:
    """Returns train.precision as it is on GPUs, for which the plan is, wherever it is made."""
    return resolve(train.precision, torch.device("cuda"))


def meta_model(
    model: ModelConfig, lora: LoraConfig, dtype: torch.dtype | None = None, layers: int | None = None
) -> PreTrainedModel:
    """Returns the model with shapes and without memory, frozen and adapted as the configuration says."""
    architecture = _architecture(model.path)
    if layers is not None:
        text = architecture.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(architecture, dtype=dtype or getattr(torch, model.dtype))
        freeze(built, model.freeze)
        adapters.attach(built, lora, base=model.path, seed=0)
    return built


def _architecture(path: str) -> Any:
    """Returns a folder's or the hub's config.json, or an installed preset's of that name."""
    preset = PRESETS / f"{Path(path).name.lower()}.json"
    if not Path(path).exists() and preset.is_file():
        values = json.loads(preset.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    from trapo.models.loading import find_weights

    source = find_weights(path)
    files = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    try:
        return AutoConfig.from_pretrained(str(source.parent if files else source), **files)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrapoError(f"model.path: no architecture for {path!r}: {reason}") from error


@contextmanager
def fake_ranks(world: int) -> Iterator[Any]:
    """Returns the mesh of a process group in which this process is rank 0 and nobody else is there; None for one
    rank."""
    if world == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    local = getattr(parameter, "to_local", None)
    return local() if local else parameter


def _weights(model: nn.Module) -> list[Weight]:
    kinds: dict[tuple, int] = {}
    for name, p in model.named_parameters():
        kind = (re.sub(r"\.\d+\.", ".*.", name), tuple(p.shape), tuple(_local(p).shape), p.requires_grad)
        kinds[kind] = kinds.get(kind, 0) + 1
    return [Weight(kind[0], count, *kind[1:]) for kind, count in kinds.items()]


def state_memory(model: nn.Module) -> dict[str, int]:
    """Returns what stays from step to step, and gradients: this rank's shards, in bytes."""
    parts = [(_local(p), p.requires_grad) for p in model.parameters()]
    weights = sum(p.numel() * p.element_size() for p, _ in parts)
    gradients = sum(p.numel() * p.element_size() for p, trained in parts if trained)
    counts = sum(4 for _, trained in parts if trained)  # AdamW counts its steps for each tensor
    return {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients + counts}


def _unit_memory(model: PreTrainedModel, precision: str) -> dict[str, int]:
    """Returns what FSDP2 holds beside the shards: the root's weights and two layers' (one computes, the next is on its
    way), and gradients of the root and of one layer that are not reduced yet."""
    width = getattr(torch, precision).itemsize
    layers = decoder_layers(model)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    root = [p for p in model.parameters() if id(p) not in in_layers]
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    trained = max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)
    return {
        "gathered weights": width * (sum(p.numel() for p in root) + 2 * largest),
        # As backward leaves them, and as they are put together to be reduced, in float32.
        "unreduced gradients": (width + 4) * (sum(p.numel() for p in root if p.requires_grad) + trained),
    }


def _teacher_memory(config: ModelConfig, mesh: Any, precision: str) -> dict[str, int]:
    """Returns the bytes of a frozen model that is sharded as the student is; its forward leaves nothing."""
    built = meta_model(config, LoraConfig()).requires_grad_(False)
    if mesh is None:
        return {"teacher's weights": state_memory(built)["weights"]}
    gathered = _unit_memory(built, precision)["gathered weights"]
    shard(built, mesh, precision)
    return {"teacher's weights": state_memory(built)["weights"], "teacher's gathered weights": gathered}


def _activations(model: ModelConfig, lora: LoraConfig, train: TrainConfig, longest: int) -> dict[str, int]:
    """Returns the bytes that the forward of one micro-batch leaves for its backward; varlen attention, no padding."""
    dtype = getattr(torch, _precision(train))
    tokens = max(train.micro_batch_tokens, longest)
    one, two = (_saved_by(meta_model(model, lora, dtype, layers), tokens) for layers in (1, 2))
    text = _architecture(model.path).get_text_config()
    layer, rest = two - one, one - (two - one)
    if not model.gradient_checkpointing:
        return {"activations": rest + text.num_hidden_layers * layer}
    kept = text.num_hidden_layers * tokens * text.hidden_size * dtype.itemsize
    return {"activations: a layer's input each": kept, "activations: of one layer, recomputed": layer + rest}


def _saved_by(model: PreTrainedModel, tokens: int) -> int:
    """Returns what a forward on the meta device keeps for its backward."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _varlen_attention)
    model.set_attn_implementation(ATTENTION)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    mask = {"full_attention": None, "sliding_attention": None}  # made already: there is no data to make it from
    return saved_bytes(model, lambda: model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False))


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Returns the storage of all tensors that autograd keeps of a forward, each once, the model's own left out."""
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()  # or storages would be freed and their addresses used again
    del alive
    return sum(saved.values())


class _VarlenAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output [B, heads, T, d] and the fp32 logsumexp [B, heads,
    T]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _varlen_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _VarlenAttention.apply(query, key, value).transpose(1, 2), None


def loss_memory(train: TrainConfig, vocab: int) -> dict[str, int]:
    """Returns what grows with tokens × vocabulary in one micro-batch, in bytes."""
    tokens = train.micro_batch_tokens
    width = getattr(torch, _precision(train)).itemsize
    budget = int(tk.get_budget_mb("cuda") * 2**20)
    return {
        OURS: max(min(tokens * vocab * width, budget), vocab * width),
        "fp32 logits and their gradient": 2 * tokens * vocab * 4,
    }


def update_flops(model: PreTrainedModel, step: StepTokens, *, checkpointing: bool) -> Flops:
    """Returns the FLOPs of the forward and backward of one step's update."""
    head = model.get_output_embeddings()
    linears = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear) and m is not head]
    forward = sum(2 * m.weight.numel() for m in linears)
    to_weights = sum(2 * m.weight.numel() for m in linears if m.weight.requires_grad)
    # Q Kᵀ and P V, of the whole square: no causal half taken off.
    square = 4 * attention_width(model.config) * step.longest
    again = step.through_model * (forward + square) if checkpointing else 0
    of_head = 2 * head.weight.numel() * (3 if head.weight.requires_grad else 2)
    through = step.through_model
    return Flops(through * (2 * forward + to_weights), through * 3 * square, step.in_loss * of_head, again)


def tables(plan: Plan, gpu: Gpu = GPUS["h100"], host: float | None = None) -> list[Table]:
    """Returns what `trapo plan` shows. host: GiB of the machine's own memory, where they are known."""
    shapes = _table(f"{plan.model} on {plan.ranks} ranks: rank 0's part", "weight", "count", "shape", "here", "trained")
    for w in plan.weights:
        shapes.add_row(w.name, str(w.count), _shape(w.shape), _shape(w.shard), "yes" if w.trained else "no")
    shapes.add_row("all", "", f"{plan.parameters:,}", "", f"{plan.trained:,}")
    memory = _bytes("memory of a rank in the update (GiB)", plan.memory, summed=True)
    logits = _bytes("logits of a micro-batch (GiB)", plan.logits, summed=False)
    beside = [
        _bytes("memory of a rank while it generates (GiB)", plan.engine, summed=True),
        _bytes("host memory of all ranks together, while they load (GiB)", plan.host, summed=True),
        _bytes("a weight sync moves (GiB)", plan.traffic, summed=False),
    ]
    step = _table("a step, all ranks, every sequence as long as can be", "of the whole batch of rollouts", "")
    for name, count in plan.tokens.items():
        step.add_row(name, f"{count:,}")
    for field in dataclasses.fields(plan.flops):
        step.add_row(f"update, {field.name} (PFLOP)", f"{getattr(plan.flops, field.name) / 1e15:,.2f}")
    step.add_row("update, sum (PFLOP)", f"{plan.flops.total / 1e15:,.2f}")
    fit = _table(f"on {plan.ranks} x {gpu.name}, by arithmetic: nothing was measured", "", "")
    for name, words in rows(plan, gpu, host):
        fit.add_row(name, words)
    return [shapes, memory, logits, *beside, step, fit]


def _bytes(title: str, parts: dict[str, int], *, summed: bool) -> Table:
    table = _table(title, "part", "GiB")
    for name, value in parts.items():
        table.add_row(name, f"{value / 2**30:.2f}")
    if summed:
        table.add_row("sum", f"{sum(parts.values()) / 2**30:.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.title_style = "bold"
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
