"""The run's configuration is a typed dataclass tree, read from YAML, changed by `key=value` overrides.

The keys stand in settings/groups.py, each with its default, one sentence and what it accepts. OmegaConf does the
merging and the type checks. Unknown keys are refused with the name that was probably meant, because a silently ignored
`learning_rate=` costs a day. `<run_dir>/config.yaml` holds file and overrides merged.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trapo.errors import TrapoError
from trapo.modes import MODES, check_mode
from trapo.settings.groups import (
    AdvantageConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    GuidanceConfig,
    HybridConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from trapo.settings.keys import check_values, key
from trapo.settings.objective import ObjectiveConfig
from trapo.settings.text import (
    Tree,
    check_keys,
    flat,
    mark_expressions,
    merge_trees,
    one_line,
    override_tree,
    read_yaml,
    to_yaml,
    tree_of,
)
from trapo.tools.files import write_atomic

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass
class Config:
    """Holds all keys of a run. Parts of the trainer take the groups that they need, never the whole."""

    mode: str = key("trapo", "The way to train (`trapo config` and docs/config.md say what each is).", choices=MODES)
    seed: int = key(0, "All random numbers of the run follow from it.", least=0)
    run_dir: str = key("runs/trapo", "The folder of the run.", named=True)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    hybrid: HybridConfig = dataclasses.field(default_factory=HybridConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


def preset_names() -> list[str]:
    """Names of the configurations that are installed with the package."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def find_config(name: str) -> Path:
    """Returns a file if there is one of this name; else the installed preset of that name (`demo`,
    `presets/demo.yaml`)."""
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
    """Reads a YAML file or preset, applies `key=value` overrides and checks everything.

    Raises TrapoError with one line that names the key.
    """
    return merge_config(read_yaml(find_config(str(name)), Config), overrides)


def merge_config(base: DictConfig | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Makes a configuration of a mapping and `key=value` overrides; the checks of `load_config`."""
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
    check_values(config)
    _check_together(config)
    return config


def settle(config: Config, log: Callable[[str], None]) -> Config:
    """Returns the configuration with what it leaves to this machine decided (models/fastest.py), and says what is not
    here."""
    from trapo.models import fastest

    config = copy.deepcopy(config)
    if line := fastest.settle(config.model, config.rollout, config.train.precision):
        log(line)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the configuration that `load_config` reads back."""
    write_atomic(path, to_yaml(config))


def load_tree(path: Path) -> Tree:
    """Returns a saved configuration, checked, as nested dicts: what a run's folder compares and writes."""
    return tree_of(load_config(path))


def default_tree() -> Tree:
    """Returns every key's default, as nested dicts."""
    return tree_of(Config())


def changed_keys(old: Config | Tree, new: Config | Tree) -> list[str]:
    """Returns the dotted names of the keys in which two configurations, or their trees, differ."""
    a, b = flat(tree_of(old)), flat(tree_of(new))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _check_together(config: Config) -> None:
    """Raises TrapoError, in one line, for values that do not go together."""
    check_mode(config)
    if config.eval.prior is not None and config.data.eval is None:
        raise TrapoError("eval.prior: it is measured with data.eval, beside what is to be learnt; data.eval is null")
    if config.objective.tis_cap is not None and config.rollout.engine == "hf":
        raise TrapoError(
            "objective.tis_cap: needs the engine's log-probabilities, which rollout.engine=hf does not give "
            "(it generates with the learner's own module); accepted: vllm, vllm_server"
        )
    for name in ("top_p", "min_p"):
        if (value := getattr(config.rollout, name)) is not None and config.rollout.top_k is None:
            raise TrapoError(f"rollout.{name}: got {value} without rollout.top_k, which bounds what a token may be of")
    if config.rollout.top_k is not None and config.rollout.engine != "hf":
        raise TrapoError(
            f"rollout.top_k: got {config.rollout.top_k} with rollout.engine={config.rollout.engine}; the loss needs to "
            "know what a token was sampled from, which only hf says"
        )
    if (config.rollout.engine == "vllm_server") != (config.rollout.server_url is not None):
        raise TrapoError(
            f"rollout.server_url: got {config.rollout.server_url} with rollout.engine={config.rollout.engine}; "
            "vllm_server needs it, the others have no server"
        )
    if config.train.normalizer == "regions" and config.objective.reduction == "sequence_mean":
        raise TrapoError(
            "train.normalizer: got regions with objective.reduction=sequence_mean; means over expert and own tokens "
            "need token_mean"
        )
    if config.eval.samples > 1 and not config.eval.temperature:
        raise TrapoError(
            f"eval.samples: got {config.eval.samples} with eval.temperature=0, the default: greedy samples are equal"
        )
