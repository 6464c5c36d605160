"""The run's configuration: a typed dataclass tree, read from YAML, changed by `key=value` overrides.

OmegaConf does the merging and the type checks; tools/config_text.py has what is text and what is not. Unknown keys are
refused with the nearest known name, because a silently ignored `learning_rate=` costs a day. A field left at None takes
its value from the mode or from the guidance preset (see modes.py and guidance.py). `<run_dir>/config.yaml` holds file
and overrides merged.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trapo.errors import TrapoError
from trapo.tools.config_text import (
    check_keys,
    mark_expressions,
    merge_trees,
    one_line,
    override_tree,
    read_yaml,
    to_yaml,
)
from trapo.tools.files import write_atomic

MODES = ("trapo", "grpo", "sft", "sft_then_rl", "luffy", "nll_prefix", "fixed_prefix")
PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass
class ModelConfig:
    path: str = "smollm2-135m-instruct"  # that name, a local folder, a .gguf file or a hub id
    dtype: str = "float32"  # of the weights; training needs float32, evaluation takes bfloat16 or float16 too
    device: str = "auto"  # auto: cuda when there is one, else cpu
    attention: str = "auto"  # auto: sdpa where the family has it, else eager; or a name that transformers knows
    gradient_checkpointing: bool = False
    freeze: str | None = None  # regular expression: parameters whose name it matches are not trained


@dataclasses.dataclass
class DataConfig:
    train: str | None = None  # JSONL, parquet, or task://...
    eval: str | None = None
    dir: str | None = None  # where the files of named benchmarks lie
    train_limit: int | None = None
    eval_limit: int | None = None
    system_prompt: str | None = None
    prompt_suffix: str = ""
    max_prompt_tokens: int = 1024
    max_trace_tokens: int = 8192
    on_bad_row: str = "raise"  # raise, skip
    dedup: bool = False  # drop repeated problems: AIME's files hold each one 32 times
    shuffle: bool = True


@dataclasses.dataclass
class GuidanceConfig:
    preset: str = "paper"  # paper, official; the fields below change single parts of it
    sizes: list[int] | None = None  # rollouts per micro-group
    ratios: list[float] | None = None  # of the expert trace that is given as prefix
    thresholds: list[float] | None = None  # guided while the mean reward so far is below
    cut: str | None = None  # token, blank_line
    traces: str | None = None  # random, in_order
    trace_part: str | None = None  # full, thinking
    supervise: str | None = None  # every, one_per_prefix
    stop_decided: bool = False  # draw no more of a prompt whose rollouts were all right (guidance.is_decided)


@dataclasses.dataclass
class ObjectiveConfig:
    """Fields of trapo_kernels.Objective; None keeps the mode's choice."""

    expert: str | None = None
    alpha: float | None = None
    expert_coef: float | None = None
    luffy_gamma: float | None = None
    policy: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    entropy_coef: float | None = None
    kl_coef: float | None = None
    tis_cap: float | None = None  # truncated importance sampling; needs an engine that gives log-probabilities: vllm


@dataclasses.dataclass
class AdvantageConfig:
    baseline: str = "all"  # all, unguided, own_tokens: whose mean reward is subtracted
    std: bool | None = None  # divide by the group's standard deviation; None: the mode's choice


@dataclasses.dataclass
class RolloutConfig:
    engine: str = "hf"  # hf: transformers; vllm: in this process; vllm_server: a running `vllm serve` (docs/vllm.md)
    temperature: float = 1.0
    max_response_tokens: int = 8192  # expert prefix + own tokens
    batch_size: int = 64  # sequences decoded together
    dtype: str | None = None  # of vllm's weights; None: model.dtype
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)  # more arguments of vllm.LLM
    server_url: str | None = None  # vllm_server: http://host:port
    weight_sync: str = "folder"  # vllm_server: folder (any device), nccl, ipc (GPUs)
    sync_folder: str | None = None  # of weight_sync=folder, seen by both sides under one path; None: in run_dir
    guard_tokens: int = 64  # compared between engine and learner after each weight sync; 0: none
    guard_tolerance: float | None = None  # nats, mean over them; None: by dtype, 1e-3 for float32
    seeding: str = "call"  # random numbers of a whole call, or of each `request`: several ranks use the latter


@dataclasses.dataclass
class RewardConfig:
    function: str = "math"  # math, math_verify, package.module:function or ./file.py:function (rewards/functions.py)
    range: list[float] | None = None  # lowest and highest reward: scaled to 0..1, others are errors; None: as they are
    workers: int = 1
    timeout: float = 10.0  # seconds for one answer; a worker past it is killed and the answer scores 0


@dataclasses.dataclass
class OptimConfig:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # of the global norm; 0: off
    schedule: str = "constant"  # constant, linear, cosine
    warmup_steps: int = 0


@dataclasses.dataclass
class TrainConfig:
    steps: int = 100
    sft_steps: int | None = None  # mode sft_then_rl: how many of the steps are SFT
    prompts_per_step: int = 8
    updates_per_step: int = 1  # optimizer steps on one batch of rollouts (minibatches)
    micro_batch_tokens: int = 4096  # in one forward-backward: real tokens where packed, else padded ones
    packing: str = "auto"  # always: one row of concatenated sequences; auto: where attention is varlen (flash)
    precision: str = "auto"  # of forward and backward, weights and optimizer are float32; auto: bfloat16 on GPUs
    normalizer: str = "tokens"  # tokens: of the global batch; constant: normalizer_constant
    normalizer_constant: float | None = None  # None: rollouts x rollout.max_response_tokens (Dr.GRPO)
    skip_inactive: bool = True  # leave sequences without any gradient out of the forward, and so out of the metrics
    threads: int | None = None  # torch CPU threads; None: torch's default
    max_skipped_steps: int = 10  # stop after so many steps in a row whose loss or gradient was not finite


@dataclasses.dataclass
class LoraConfig:
    rank: int = 0  # 0: all weights are trained
    alpha: float = 32.0  # the adapter counts alpha / rank
    targets: list[str] | None = None  # names of linear layers; None: all but the head


@dataclasses.dataclass
class EvalConfig:
    every: int = 0  # steps between evaluations; 0: only before and after
    before: bool = True
    suite: str | None = None  # `trapo eval`: the benchmarks of a suite (evaluation/benchmarks.py), read from data.dir
    benchmarks: list[str] | None = None  # or these: names and files, with @k for k samples a problem, as in aime24@8
    temperature: float | None = None  # 0: greedy; None: 0 on data.eval, 0.6 on benchmarks
    samples: int = 1  # per problem of data.eval: avg@k and pass@k when above 1
    max_response_tokens: int | None = None  # None: rollout.max_response_tokens


@dataclasses.dataclass
class CheckpointConfig:
    every: int = 50  # steps; 0: only the final model (and what SIGTERM saves)
    keep: int = 2  # the newest; with 1 there is no other one to go back to should it be damaged
    keep_best: int = 0  # also save at every evaluation, and keep the so many best by held-out accuracy


@dataclasses.dataclass
class LogConfig:
    """Beyond metrics.jsonl, which is always written."""

    tensorboard: bool = False  # in run_dir/tensorboard
    wandb: bool = False  # project trapo, or WANDB_PROJECT; WANDB_MODE=offline works
    rollouts_every: int = 5  # steps between samples of rollouts in rollouts.jsonl; 0: none
    rollouts: int = 4  # rollouts in a sample, of as many guidance levels as there are


@dataclasses.dataclass
class Config:
    mode: str = "trapo"
    seed: int = 0
    run_dir: str = "runs/trapo"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


# What each word-valued field accepts; everything else is checked by its type or by a bound below.
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "model.dtype": ("float32", "bfloat16", "float16"),
    "data.on_bad_row": ("raise", "skip"),
    "guidance.preset": ("paper", "official"),
    "guidance.cut": ("token", "blank_line"),
    "guidance.traces": ("random", "in_order"),
    "guidance.trace_part": ("full", "thinking"),
    "guidance.supervise": ("every", "one_per_prefix"),
    "advantage.baseline": ("all", "unguided", "own_tokens"),
    "rollout.engine": ("hf", "vllm", "vllm_server"),
    "rollout.dtype": ("float32", "bfloat16", "float16"),
    "rollout.weight_sync": ("folder", "nccl", "ipc"),
    "rollout.seeding": ("call", "request"),
    "train.packing": ("auto", "always", "never"),
    "train.precision": ("auto", "float32", "bfloat16"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "train.normalizer": ("tokens", "constant"),
}
# (lowest accepted value, whether that value itself is accepted)
BOUNDS: dict[str, tuple[float, bool]] = {
    "seed": (0, True),
    "data.train_limit": (1, True),
    "data.eval_limit": (1, True),
    "data.max_prompt_tokens": (1, True),
    "data.max_trace_tokens": (1, True),
    "rollout.temperature": (0, False),
    "rollout.max_response_tokens": (1, True),
    "rollout.batch_size": (1, True),
    "rollout.guard_tokens": (0, True),
    "rollout.guard_tolerance": (0, False),
    "objective.tis_cap": (0, False),
    "reward.workers": (1, True),
    "reward.timeout": (0, False),
    "optim.lr": (0, False),
    "optim.eps": (0, False),
    "optim.weight_decay": (0, True),
    "optim.grad_clip": (0, True),
    "optim.warmup_steps": (0, True),
    "train.steps": (1, True),
    "train.sft_steps": (1, True),
    "train.prompts_per_step": (1, True),
    "train.updates_per_step": (1, True),
    "train.micro_batch_tokens": (1, True),
    "train.normalizer_constant": (0, False),
    "train.threads": (1, True),
    "train.max_skipped_steps": (1, True),
    "lora.rank": (0, True),
    "lora.alpha": (0, False),
    "eval.every": (0, True),
    "eval.temperature": (0, True),
    "eval.samples": (1, True),
    "eval.max_response_tokens": (1, True),
    "checkpoint.every": (0, True),
    "checkpoint.keep": (1, True),
    "checkpoint.keep_best": (0, True),
    "log.rollouts_every": (0, True),
    "log.rollouts": (1, True),
}


# Texts that name something; the others may be empty: data.system_prompt= takes the chat template's own away.
NOT_EMPTY = (
    *("run_dir", "model.path", "data.train", "data.eval", "data.dir", "reward.function"),
    *("rollout.server_url", "rollout.sync_folder", "eval.suite", "eval.benchmarks", "lora.targets"),
)


def preset_names() -> list[str]:
    """Names of the configurations that are installed with the package."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """A file if there is one; else the installed preset of that name (`demo`, `presets/demo.yaml`)."""
    path = Path(name)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")  # not path.stem: a name may hold a dot
    preset = PRESETS / f"{stem}.yaml"
    if str(path.parent) in (".", "presets") and preset.is_file():
        return preset
    near = difflib.get_close_matches(stem, preset_names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise TrapoError(f"CONFIG: no file {name!r}; presets: {', '.join(preset_names())}{hint}")


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file or preset, apply `key=value` overrides, check everything.

    Raises TrapoError with one line that names the key.
    """
    return merge_config(read_yaml(find_config(str(name)), Config), overrides)


def merge_config(base: DictConfig | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Configuration from a mapping and `key=value` overrides; the checks of `load_config`."""
    try:
        # By value, so that expressions stay what they are.
        tree = OmegaConf.to_container(OmegaConf.create(base if isinstance(base, DictConfig) else dict(base)))
    except OmegaConfBaseException as error:
        raise TrapoError(f"config: {one_line(error)}") from error
    tree = typing.cast(dict[str, Any], tree)
    check_keys(tree, Config)
    for item in overrides:
        change = override_tree(item, Config)
        check_keys(change, Config)
        tree = merge_trees(tree, change)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(tree))
        config = typing.cast(Config, OmegaConf.to_object(merged))
        mark_expressions(config, typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False)))
    except OmegaConfBaseException as error:
        raise TrapoError(f"{getattr(error, 'full_key', '') or 'config'}: {one_line(error)}") from error
    except RecursionError:
        raise TrapoError("config: an expression ${...} refers to itself") from None
    _check_texts(config)
    _check_values(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the configuration that `load_config` reads back."""
    write_atomic(path, to_yaml(config))


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted names of the fields in which two configurations differ."""
    a, b = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _check_texts(config: Config) -> None:
    for key, value in _flatten(dataclasses.asdict(config)).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(text, str):
                continue
            if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                raise TrapoError(f"{key}: got {text[:100]!r}; a text cannot hold NUL or bytes that are not UTF-8")
            if key in NOT_EMPTY and not text:
                raise TrapoError(f"{key}: got an empty text; leave it out or give it a value")


def _check_values(config: Config) -> None:
    flat = _flatten(dataclasses.asdict(config))
    for key, accepted in CHOICES.items():
        if flat[key] is not None and flat[key] not in accepted:
            raise TrapoError(f"{key}: got {flat[key]!r}; accepted: {', '.join(accepted)}")
    for key, (low, inclusive) in BOUNDS.items():
        value = flat[key]
        if value is not None and not ((value >= low if inclusive else value > low) and math.isfinite(value)):
            raise TrapoError(f"{key}: got {value}; must be {'>=' if inclusive else '>'} {low}, and finite")
    bounds = config.reward.range
    if bounds is not None and not (len(bounds) == 2 and all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]):
        raise TrapoError(f"reward.range: got {list(bounds)}; must be two finite numbers, the lower one first")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise TrapoError(f"optim.betas: got {list(config.optim.betas)}; both must be in [0, 1)")
    if config.mode == "sft_then_rl":
        if config.train.sft_steps is None or config.train.sft_steps >= config.train.steps:
            raise TrapoError(
                f"train.sft_steps: mode sft_then_rl needs 1 <= sft_steps < train.steps={config.train.steps}, "
                f"got {config.train.sft_steps}"
            )
    elif config.train.sft_steps is not None:
        raise TrapoError(f"train.sft_steps: only mode sft_then_rl has SFT steps; got mode {config.mode}")
    if config.objective.tis_cap is not None and config.rollout.engine == "hf":
        raise TrapoError(
            "objective.tis_cap: needs the engine's log-probabilities, which rollout.engine=hf does not give "
            "(it generates with the learner's own module); accepted: vllm, vllm_server"
        )
    if (config.rollout.engine == "vllm_server") != (config.rollout.server_url is not None):
        raise TrapoError(
            f"rollout.server_url: got {config.rollout.server_url} with rollout.engine={config.rollout.engine}; "
            "vllm_server needs it, the others have no server"
        )
    if config.eval.samples > 1 and not config.eval.temperature:
        raise TrapoError(
            f"eval.samples: got {config.eval.samples} with eval.temperature=0, the default: greedy samples are equal"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
