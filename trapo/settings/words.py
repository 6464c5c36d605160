"""This file finds which key is meant where another name is given: the words of other trainers, and slips of the pen."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator

# What TRL, transformers, verl and Liger call it -> the key here.
WORDS: dict[str, str] = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "warmup_ratio": "optim.warmup_steps",
    "max_grad_norm": "optim.grad_clip",
    "clip_grad": "optim.grad_clip",
    "gradient_clipping": "optim.grad_clip",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "beta": "objective.kl_coef",
    "kl_beta": "objective.kl_coef",
    "kl_loss_coef": "objective.kl_coef",
    "kl_coeff": "objective.kl_coef",
    "epsilon": "objective.clip_low",
    "cliprange": "objective.clip_low",
    "clip_ratio": "objective.clip_low",
    "clip_ratio_low": "objective.clip_low",
    "clip_ratio_high": "objective.clip_high",
    "epsilon_high": "objective.clip_high",
    "delta": "objective.dual_clip",
    "clip_ratio_c": "objective.dual_clip",
    "entropy_coeff": "objective.entropy_coef",
    "vllm_importance_sampling_cap": "objective.tis_cap",
    "tis_imp_ratio_cap": "objective.tis_cap",
    "loss_type": "objective.policy",
    "loss_mode": "objective.policy",
    "loss_agg_mode": "objective.reduction",
    "num_generations": "guidance.group_size",
    "rollout_n": "guidance.group_size",
    "n": "guidance.group_size",
    "n_samples": "guidance.group_size",
    "scale_rewards": "advantage.std",
    "norm_adv_by_std_in_grpo": "advantage.std",
    "max_completion_length": "rollout.max_response_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_tokens": "rollout.max_response_tokens",
    "max_length": "rollout.max_response_tokens",
    "max_seq_length": "rollout.max_response_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "use_vllm": "rollout.engine",
    "vllm_mode": "rollout.engine",
    "vllm_server_base_url": "rollout.server_url",
    "epochs": "train.steps",
    "num_epochs": "train.steps",
    "num_train_epochs": "train.steps",
    "total_epochs": "train.steps",
    "max_steps": "train.steps",
    "total_training_steps": "train.steps",
    "num_iterations": "train.updates_per_step",
    "ppo_epochs": "train.updates_per_step",
    "batch_size": "train.prompts_per_step",
    "train_batch_size": "train.prompts_per_step",
    "per_device_train_batch_size": "train.prompts_per_step",
    "generation_batch_size": "rollout.batch_size",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "train.micro_batch_tokens",
    "ppo_mini_batch_size": "train.updates_per_step",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "mixed_precision": "train.precision",
    "padding_free": "train.packing",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "output_dir": "run_dir",
    "train_file": "data.train",
    "train_files": "data.train",
    "train_dataset": "data.train",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "eval_dataset": "data.eval",
    "val_files": "data.eval",
    "reward_func": "reward.function",
    "reward_funcs": "reward.function",
    "reward_fn": "reward.function",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "save_steps": "checkpoint.every",
    "save_freq": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "test_freq": "eval.every",
    "report_to": "log.wandb",
    "logging_steps": "log.rollouts_every",
    "resume_from_checkpoint": "run_dir",
    "top_p": "rollout.temperature",
    "top_k": "rollout.temperature",
    "min_p": "rollout.temperature",
}
# What a key is not, where its name alone would mislead.
NOTES = {
    "epochs": "steps = epochs × problems / train.prompts_per_step",
    "batch_size": "prompts, of which each has guidance.group_size rollouts",
    "beta": "the weight of the KL term",
    "epsilon": "and objective.clip_high",
    "report_to": "or log.tensorboard",
    "logging_steps": "metrics.jsonl has every step",
    "resume_from_checkpoint": "the same command goes on with the run that is there",
    "top_p": "training samples from the whole distribution, which the loss is about",
    "gradient_accumulation_steps": "a step is cut into micro-batches by itself",
}
_SAME = {
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "total_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "top_k": "top_p",
    "min_p": "top_p",
    "cliprange": "epsilon",
    "clip_ratio": "epsilon",
}

# Without a group before them: groups of verl's, whose keys are here in these, and what several groups have.
_AT_THE_TOP = {
    "trainer": "train, eval, checkpoint and log",
    "actor_rollout_ref": "model, optim, rollout, objective and train",
    "actor": "optim, objective and train",
    "algorithm": "advantage and objective",
    "custom_reward_function": "reward",
    "reward_model": "reward",
    "steps": "train.steps",
}


def meant_key(name: str, prefix: str, known: typing.Iterable[str], root: type) -> str:
    """Returns the key that was probably meant by `prefix` + `name`, with a note where it is something else than it
    sounds.

    known: the names that there are behind the prefix. root: the whole schema.
    """
    known = list(known)
    if not prefix and name in _AT_THE_TOP:
        return _AT_THE_TOP[name]
    here = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    alike = difflib.SequenceMatcher(None, name, here).ratio()
    if word := difflib.get_close_matches(name.lower(), WORDS, n=1, cutoff=max(alike + 1e-6, 0.9)):
        note = NOTES.get(_SAME.get(word[0], word[0]))
        return WORDS[word[0]] + (f" ({note})" if note else "")
    leaves = {leaf.rpartition(".")[2]: leaf for leaf in reversed(list(_leaves(root)))}
    if name in leaves:
        return leaves[name]
    if alike >= 0.6:
        return prefix + here
    if elsewhere := difflib.get_close_matches(name, leaves, n=1, cutoff=0.8):
        return leaves[elsewhere[0]]
    return prefix + here


def _leaves(schema: typing.Any, prefix: str = "") -> Iterator[str]:
    for field, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{field}.")
        else:
            yield prefix + field
