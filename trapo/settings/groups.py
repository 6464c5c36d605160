"""The keys of a configuration come in groups: one dataclass a group, one line a key.

Beside each key stand its default, one sentence, and what it accepts (keys.py). `trapo config` and docs/config.md are
made of these lines. A field left at None takes its value from the mode or from the guidance preset (modes/,
guidance.py). The group `objective` is made of the fields of `trapo_kernels.Objective` (objective.py).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from trapo import guidance
from trapo.data.problem import COLUMNS
from trapo.settings.keys import Rule, key

_DTYPES = ("float32", "bfloat16", "float16")
_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass
class ModelConfig:
    path: str = key(
        "smollm2-135m-instruct", "That model by name, a local folder, a .gguf file or a hub id.", named=True
    )
    dtype: str = key(
        "float32",
        "The dtype of the weights; training needs float32, evaluation takes the others too.",
        choices=_DTYPES,
    )
    device: str = key("auto", "Where the model is; auto is cuda when there is one, else cpu.")
    attention: str = key(
        "auto",
        "auto: sdpa where the family has it, else eager; fastest: flash_attention_2 where a GPU, bfloat16 and "
        "flash-attn are here, else as auto; or an implementation that transformers knows by name.",
    )
    gradient_checkpointing: bool = key(False, "Compute activations again in the backward instead of keeping them.")
    freeze: str | None = key(None, "A regular expression: parameters whose name it matches are not trained.")


@dataclasses.dataclass
class DataConfig:
    train: str | None = key(
        None, "The problems to train on: a .jsonl, .json, .csv or .parquet file, or task://...", named=True
    )
    eval: str | None = key(None, "The held-out problems, in any of the same forms.", named=True)
    dir: str | None = key(None, "The folder that holds the files of named benchmarks.", named=True)
    columns: dict[str, str] = key(
        {},
        "The columns of your files by our names for them, as {prompt: question, answer: solution}.",
        rule=Rule(f"names must be among {', '.join(COLUMNS)}", set(COLUMNS).issuperset),
        said=f"mapping of {', '.join(COLUMNS)} to columns",
    )
    train_limit: int | None = key(None, "Use only the first so many problems of data.train.", least=1)
    eval_limit: int | None = key(
        None, "Use only the first so many problems of data.eval, or of each benchmark.", least=1
    )
    system_prompt: str | None = key(
        None, "The system message in place of the prompts' own; empty takes that away, null keeps it."
    )
    prompt_suffix: str = key("", "A text that is put behind each prompt's last message.")
    chat_template: str | None = key(
        None,
        "A chat template in place of the tokenizer's, which base models have none of: a Jinja file, or plain.",
        named=True,
    )
    max_prompt_tokens: int = key(1024, "Problems with a longer prompt are left out.", least=1)
    max_trace_tokens: int = key(8192, "Expert traces that are longer are left out.", least=1)
    on_bad_row: str = key(
        "raise",
        "What a row that cannot be used does: stop the run, or be left out and counted.",
        choices=("raise", "skip"),
    )
    dedup: bool = key(False, "Drop repeated problems: AIME's files hold each one 32 times.")
    shuffle: bool = key(True, "Take the problems of each epoch in an order of its own, by seed.")


@dataclasses.dataclass
class GuidanceConfig:
    preset: str = key(
        "paper",
        "The paper's rules, or those of the authors' code; the keys below change parts of it.",
        choices=guidance.PRESETS,
    )
    group_size: int | None = key(
        None, "Rollouts of a prompt, split over micro-groups as the preset's are (paper: 4, 2, 1, 1 of 8).", least=1
    )
    sizes: list[int] | None = key(None, "Or the rollouts of each micro-group; null is the preset's.")
    ratios: list[float] | None = key(None, "The share of an expert trace that each micro-group gets as its prefix.")
    thresholds: list[float] | None = key(
        None, "A micro-group is guided while the mean reward of a prompt's earlier rollouts is below its threshold."
    )
    cut: str | None = key(
        None,
        "Where a prefix ends: at a token by its ratio, or at the next blank line of the trace.",
        choices=("token", "blank_line"),
    )
    traces: str | None = key(None, "Which of a prompt's traces a micro-group takes.", choices=("random", "in_order"))
    trace_part: str | None = key(
        None, "The whole trace, or what comes before its </think>.", choices=("full", "thinking")
    )
    supervise: str | None = key(
        None,
        "Which prefixes carry the expert term: every one, or one of those that share it.",
        choices=("every", "one_per_prefix"),
    )
    find: bool | None = key(
        None, "prefix_rl: look for the shortest prefix that helps, by bisection over the epochs; null is true there."
    )
    instruction: str | None = key(
        None,
        "prefix_rl: the prefix stands in the prompt, in this text, to be gone on with; pope is that paper's.",
        rule=Rule(
            "must be pope, or hold {problem} and {partial} once each",
            lambda text: text == "pope" or all(text.count(place) == 1 for place in ("{problem}", "{partial}")),
        ),
    )
    stop_decided: bool = key(False, "Draw no more of a prompt whose rollouts were all right (guidance.is_decided).")


@dataclasses.dataclass
class AdvantageConfig:
    baseline: str = key(
        "all", "Of which rollouts of a group the mean reward is subtracted.", choices=("all", "unguided", "own_tokens")
    )
    std: bool | None = key(None, "Divide by the group's standard deviation; null is the mode's choice.")


@dataclasses.dataclass
class RolloutConfig:
    engine: str = key(
        "hf",
        "What generates: transformers, vLLM in this process, or a running `vllm serve` (docs/vllm.md); auto is vllm "
        "where a GPU and vLLM are here, else hf.",
        choices=("hf", "vllm", "vllm_server", "auto"),
    )
    temperature: float = key(1.0, "The sampling temperature, which the loss takes into account.", above=0)
    top_k: int | None = key(
        None, "Sample from the so many likeliest tokens, and train on that distribution; engine hf.", least=1
    )
    top_p: float | None = key(
        None,
        "Of these, from the likeliest that together have this probability.",
        rule=Rule("must be above 0 and at most 1", lambda p: 0 < p <= 1),
    )
    min_p: float | None = key(
        None,
        "Of these, from those that have at least this share of the likeliest's probability.",
        rule=Rule("must be above 0 and at most 1", lambda p: 0 < p <= 1),
    )
    max_response_tokens: int = key(8192, "The limit of a response: expert prefix and own tokens together.", least=1)
    batch_size: int = key(64, "Sequences that are decoded together.", least=1)
    dtype: str | None = key(None, "The dtype of vLLM's weights; null is model.dtype.", choices=_DTYPES)
    engine_args: dict[str, Any] = key({}, "More arguments of vllm.LLM.")
    server_url: str | None = key(None, "The address of the server of engine vllm_server, http://host:port.", named=True)
    weight_sync: str = key(
        "folder",
        "How engine vllm_server gets new weights: through a folder (any device), or nccl or ipc (GPUs).",
        choices=("folder", "nccl", "ipc"),
    )
    sync_folder: str | None = key(
        None, "The folder of weight_sync=folder, seen by both sides under one path; null is one in run_dir.", named=True
    )
    guard_tokens: int = key(
        64, "Tokens whose log-probabilities engine and learner compare after each weight sync; 0 is none.", least=0
    )
    guard_tolerance: float | None = key(
        None,
        "The mean difference, in nats, that the comparison allows; null goes by dtype (1e-3 for float32).",
        above=0,
    )
    ahead: int = key(
        0,
        "1 draws the next step's rollouts while a step's update runs, so one update old; vllm_server (docs/vllm.md).",
        least=0,
        most=1,
    )
    seeding: str = key(
        "call",
        "Whether a whole call has random numbers, or each request its own, as several ranks need.",
        choices=("call", "request"),
    )


@dataclasses.dataclass
class RewardConfig:
    function: str = key(
        "math",
        "math, math_verify, or a function of yours: package.module:function or ./file.py:function (docs/rewards.md).",
        named=True,
    )
    range: list[float] | None = key(
        None,
        "The lowest and the highest reward, scaled to 0 and 1 (others are errors); null: 0 to 1, others stop the run.",
        rule=Rule(
            "must be two finite numbers, the lower one first",
            lambda pair: len(pair) == 2 and all(map(math.isfinite, pair)) and pair[0] < pair[1],
        ),
    )
    workers: int = key(1, "Processes that compute rewards.", least=1)
    timeout: float = key(10.0, "Seconds for one answer; a worker past it is killed and the answer scores 0.", above=0)


@dataclasses.dataclass
class ExpertOptimConfig:
    """Gives expert tokens an AdamW of their own: each side has a mean, moments and a learning rate."""

    lr: float | None = key(
        None, "Its learning rate, as SFT alone would have it; null is one optimizer for all tokens.", above=0
    )
    schedule: str = key("linear", "What its learning rate does until train.steps.", choices=_SCHEDULES)


@dataclasses.dataclass
class OptimConfig:
    lr: float = key(1e-6, "The learning rate of AdamW.", above=0)
    betas: tuple[float, float] = key(
        (0.9, 0.999),
        "The decay rates of AdamW's two averages.",
        rule=Rule("both must be in [0, 1)", lambda pair: all(0 <= beta < 1 for beta in pair)),
    )
    eps: float = key(1e-8, "What AdamW adds to its denominator.", above=0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay.", least=0)
    grad_clip: float = key(1.0, "The limit of the gradient's global norm; 0 is none.", least=0)
    schedule: str = key(
        "constant",
        "What the learning rate does after the warmup, until train.steps.",
        choices=_SCHEDULES,
    )
    warmup_steps: int = key(0, "Steps in which the learning rate rises to its full value.", least=0)
    expert: ExpertOptimConfig = dataclasses.field(default_factory=ExpertOptimConfig)


@dataclasses.dataclass
class HybridConfig:
    """Sets modes that mix imitation with RL, each of which reads some; null is the mode's own (docs/modes.md)."""

    gate: int | None = key(None, "hpt: up to so many right rollouts, a prompt is imitated instead.", least=0)
    high: float | None = key(
        None,
        "uft, prefix_rft, chord: where the share of a trace, or μ, begins; amft: μ's upper bound.",
        least=0,
        most=1,
    )
    low: float | None = key(None, "uft, prefix_rft, chord: where it ends; amft: μ's lower bound.", least=0, most=1)
    steps: int | None = key(None, "uft, prefix_rft, chord: after so many steps.", least=1)
    keep: float | None = key(
        None, "prefix_rft: the share of prefix tokens, by entropy, that is learnt.", above=0, most=1
    )
    buffer: int | None = key(None, "relift: prompts that have failed, of one SFT step.", least=1)
    mix: float | None = key(None, "bridge: the weight λ of imitation; amft: μ in the first step.", least=0, most=1)
    meta_lr: float | None = key(None, "amft: how far its meta-gradient, a cosine, moves μ in a step.", least=0, most=1)
    entropy_lr: float | None = key(None, "amft: how far a nat below the first step's entropy moves μ.", least=0, most=1)


@dataclasses.dataclass
class DistillConfig:
    """Sets modes distill and self_distill; null is the mode's own (docs/modes.md)."""

    teacher: str | None = key(
        None,
        "distill: a model's path, http://host:port of a `vllm serve`, or columns, which are topk_ids and topk_logprobs "
        "of traces; self_distill: the weights of the teacher, current (default) or initial.",
        named=True,
    )
    kind: str | None = key(
        None,
        "The divergence; null is reverse_kl for distill and jsd for self_distill.",
        choices=("forward_kl", "reverse_kl", "jsd", "mixed"),
    )
    beta: float | None = key(
        None,
        "The teacher's weight in the mixture of jsd, the forward KL's in mixed; null is 0.5.",
        rule=Rule("must be above 0 and below 1", lambda beta: 0 < beta < 1),
    )
    coef: float | None = key(
        None, "What the divergence is multiplied by, beside objective's terms; null is 1.", above=0
    )
    tail: str | None = key(
        None,
        "Of a top-k: the other classes are one more, or left out, or both sides renormalised; null is bucket.",
        choices=("bucket", "drop", "renormalise"),
    )
    top_k: int | None = key(None, "Ids that a server is asked for, of each token; null is 20.", least=1)
    dtype: str | None = key(None, "The dtype of a teacher's weights; null is model.dtype.", choices=_DTYPES)
    template: str | None = key(
        None,
        "self_distill: what the teacher's last message is, with {prompt} and {trace} in it.",
        rule=Rule("must have {prompt} and {trace} in it", lambda text: "{prompt}" in text and "{trace}" in text),
        said="text with {prompt} and {trace}",
    )
    check_every: int | None = key(
        None, "Steps between measurements of the divergence after an update, too; null is 10, 0 never.", least=0
    )


@dataclasses.dataclass
class SftConfig:
    """These are for the SFT phase of mode sft_then_rl; what is null is as in `optim` and `train`."""

    lr: float | None = key(None, "Its learning rate: SFT bears one 10 to 100 times that of RL.", above=0)
    schedule: str | None = key(None, "What its learning rate does until its last step.", choices=_SCHEDULES)
    prompts_per_step: int | None = key(None, "Prompts of a step of it.", least=1)


@dataclasses.dataclass
class TrainConfig:
    steps: int = key(
        100, "Steps of the run: each draws rollouts of prompts_per_step prompts and learns from them.", least=1
    )
    sft_steps: int | str | None = key(
        None,
        "How many of the steps are SFT, in mode sft_then_rl; auto ends it when the held-out traces get no likelier.",
        rule=Rule("must be a whole number above 0 or auto", lambda n: n == "auto" or (isinstance(n, int) and n > 0)),
    )
    prompts_per_step: int = key(8, "Prompts of a step.", least=1)
    updates_per_step: int = key(1, "Optimizer steps on one batch of rollouts (minibatches).", least=1)
    micro_batch_tokens: int = key(
        4096, "Tokens in one forward and backward: real ones where batches are packed, else padded ones.", least=1
    )
    packing: str = key(
        "auto",
        "always puts sequences one behind the other into a row; auto does where attention is varlen (flash).",
        choices=("auto", "always", "never"),
    )
    share_prefixes: str = key(
        "auto",
        "auto runs what rollouts begin with through the model once, where attention takes a mask and none is packed.",
        choices=("auto", "never"),
    )
    precision: str = key(
        "auto",
        "The dtype of forward and backward (weights and optimizer are float32); auto is bfloat16 on GPUs.",
        choices=("auto", "float32", "bfloat16"),
    )
    normalizer: str = key(
        "tokens",
        "What the summed loss is divided by: the batch's tokens (by objective.reduction sequences or 1), expert and "
        "own tokens apart (regions), or a constant, beside which the entropy bonus is a mean over tokens.",
        choices=("tokens", "regions", "constant"),
    )
    normalizer_constant: float | None = key(
        None, "The divisor of normalizer=constant; null is rollouts × rollout.max_response_tokens (Dr.GRPO).", above=0
    )
    skip_inactive: bool = key(
        True, "Leave sequences without any gradient out of the forward, and so out of the metrics."
    )
    threads: int | None = key(None, "Torch's CPU threads; null is torch's default.", least=1)
    max_skipped_steps: int = key(
        10, "Stop after so many steps in a row whose loss or gradient was not finite.", least=1
    )


@dataclasses.dataclass
class LoraConfig:
    rank: int = key(0, "The rank of low-rank adapters; 0 trains all weights instead.", least=0)
    alpha: float = key(32.0, "The adapter counts alpha / rank.", above=0)
    targets: list[str] | None = key(
        None, "Names of the linear layers that get adapters; null is all but the head.", named=True
    )


@dataclasses.dataclass
class EvalConfig:
    every: int = key(0, "Steps between evaluations; 0 is only before and after.", least=0)
    before: bool = key(True, "Evaluate before the first step.")
    prior: str | None = key(
        None,
        "What the base model could do, measured with data.eval: texts (.txt, or .jsonl with `text`) or problems.",
        named=True,
    )
    suite: str | None = key(None, "For `trapo eval`: the benchmarks of a suite (math), read from data.dir.", named=True)
    benchmarks: list[str] | None = key(
        None, "Or these: names and files, with @k for k samples a problem, as in aime24@8.", named=True
    )
    temperature: float | None = key(None, "0 is greedy; null is 0 on data.eval and 0.6 on benchmarks.", least=0)
    samples: int = key(1, "Samples a problem of data.eval: avg@k and pass@k when above 1.", least=1)
    max_response_tokens: int | None = key(None, "The limit of an answer; null is rollout.max_response_tokens.", least=1)


@dataclasses.dataclass
class CheckpointConfig:
    every: int = key(50, "Steps between checkpoints; 0 is only the final model (and what SIGTERM saves).", least=0)
    keep: int = key(
        2, "Keep the so many newest; with 1 there is no other one to go back to should it be damaged.", least=1
    )
    keep_best: int = key(0, "Also save at every evaluation, and keep the so many best by held-out accuracy.", least=0)


@dataclasses.dataclass
class LogConfig:
    """These come beside metrics.jsonl, which is always written."""

    tensorboard: bool = key(False, "Write TensorBoard's events, in run_dir/tensorboard.")
    wandb: bool = key(False, "Log to W&B, project trapo or WANDB_PROJECT; WANDB_MODE=offline works.")
    trackio: bool = key(False, "Log to trackio, project trapo or TRACKIO_PROJECT; `trackio show` shows it.")
    rollouts_every: int = key(5, "Steps between samples of rollouts in rollouts.jsonl; 0 is none.", least=0)
    rollouts: int = key(4, "Rollouts in a sample, at least: prompts are taken whole, with all of theirs.", least=1)
