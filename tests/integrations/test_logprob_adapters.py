"""Loss modules for frameworks that are not installed, against stubs of exactly the calls that those make.

The stubs have the names, fields and signatures of the commits that each module's docstring cites; the expected losses
are the frameworks' own formulas, written out in plain torch.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import trapo_kernels as tk


@pytest.fixture
def adapter(monkeypatch):
    """adapter(name, {module: its contents}) imports trapo_kernels.integrations.name beside these stubs."""

    def load(name, stubs):
        for path, contents in stubs.items():
            parts = path.split(".")
            for n in range(1, len(parts) + 1):
                module = types.ModuleType(".".join(parts[:n]))
                module.__path__ = []
                monkeypatch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
            vars(sys.modules[path]).update(contents)
        ours = f"trapo_kernels.integrations.{name}"
        monkeypatch.delitem(sys.modules, ours, raising=False)
        found = importlib.import_module(ours)
        monkeypatch.delitem(sys.modules, ours)  # it holds the stubs
        return found

    return load


def make_batch(rows=4, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(rows, length, generator=g)

    logprobs = -normal().abs()
    return SimpleNamespace(
        logprobs=logprobs.clone().requires_grad_(), old=logprobs + 0.4 * normal(), engine=logprobs + 0.4 * normal(),
        ref=logprobs + 0.3 * normal(), advantages=normal(), mask=torch.rand(rows, length, generator=g) < 0.7,
    )  # fmt: skip


def clipped(b, low, high, dual=None, old=None):
    """PPO's clipped loss of each token."""
    ratio = (b.logprobs - (b.old if old is None else old)).exp()
    loss = -torch.minimum(ratio * b.advantages, ratio.clamp(1 - low, 1 + high) * b.advantages)
    if dual is None:
        return loss
    return torch.where(b.advantages < 0, torch.minimum(loss, -dual * b.advantages), loss)


def trsft(logprobs, alpha=0.1):
    p = logprobs.exp()
    return torch.where(p >= alpha, -logprobs, 1 - torch.tensor(alpha).log() - p / alpha)


def assert_same(loss, expected, leaf, retain=False):
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, stock = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf, retain_graph=retain)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


# SkyRL -------------------------------------------------------------------------------------------------------


class Registry:
    """SkyRL's PolicyLossRegistry, as far as a user meets it."""

    functions: ClassVar[dict] = {}

    @classmethod
    def register(cls, name, function):
        cls.functions[name] = function


def test_skyrl_sums_over_the_mask_and_clips_as_configured(adapter):
    stub = {"skyrl.backends.skyrl_train.utils.ppo_utils": {"PolicyLossRegistry": Registry}}
    adapter("skyrl", stub).register("ours")
    config, b = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.28), make_batch()
    loss, metrics = Registry.functions["ours"](  # worker.py: three by position, the others by name
        b.logprobs, b.old, b.advantages, config=config, loss_mask=b.mask.float(), rollout_logprobs=b.engine
    )
    assert_same(loss, (clipped(b, 0.2, 0.28) * b.mask).sum(), b.logprobs)
    ratio, a = (b.logprobs - b.old).exp(), b.advantages
    gone = ((ratio < 0.8) & (a < 0)) | ((ratio > 1.28) & (a > 0))
    assert metrics["clip_ratio"] == pytest.approx(gone[b.mask].float().mean().item())
    assert all(isinstance(value, float) for value in metrics.values())


def test_skyrl_takes_other_terms_and_no_mask(adapter):
    stub = {"skyrl.backends.skyrl_train.utils.ppo_utils": {"PolicyLossRegistry": Registry}}
    loss_of = adapter("skyrl", stub).make_policy_loss(policy="cispo", clip_high=4.0, clip_low=None)
    config, b = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.28), make_batch()
    loss, _ = loss_of(b.logprobs, b.old, b.advantages, config, loss_mask=None, rollout_logprobs=None)
    weight = (b.logprobs - b.old).exp().clamp(max=5.0).detach()
    assert_same(loss, -(weight * b.advantages * b.logprobs).sum(), b.logprobs)


# NeMo-RL -----------------------------------------------------------------------------------------------------


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    NONE = "none"


NEMO = {"nemo_rl.algorithms.loss.interfaces": {c.__name__: c for c in (LossType, LossInputType, MetricNormalizer)}}


def nemo_batch(b):
    """The batch's fields are one token longer; their first column is of no prediction."""

    def padded(values):
        return torch.cat([torch.full_like(values[:, :1], 7), values], 1)

    fields = {
        "advantages": b.advantages, "prev_logprobs": b.old, "generation_logprobs": b.engine,
        "reference_policy_logprobs": b.ref, "token_mask": b.mask.float(),
    }  # fmt: skip
    return {**{n: padded(t) for n, t in fields.items()}, "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0])}


def test_nemo_rl_divides_by_the_valid_tokens_of_the_global_batch(adapter):
    loss_fn, b = adapter("nemo_rl", NEMO).TrapoLossFn(clip_high=0.28, kl_coef=0.01), make_batch()
    data, toks = nemo_batch(b), torch.tensor(50.0)
    loss, metrics = loss_fn(
        next_token_logprobs=b.logprobs, data=data, global_valid_seqs=torch.tensor(6.0), global_valid_toks=toks
    )
    mask, delta = b.mask * data["sample_mask"][:, None], b.ref - b.logprobs
    token = clipped(b, 0.2, 0.28) + 0.01 * (delta.exp() - delta - 1)
    assert_same(loss, (token * mask).sum() / toks, b.logprobs)
    ratio = (b.logprobs - b.old).exp()
    assert metrics["probs_ratio"] == pytest.approx((ratio * mask).sum().item() / 50, rel=1e-5)
    assert metrics["num_valid_samples"] == 3
    assert set(metrics) == set(loss_fn.metric_normalizations)
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL
    assert loss_fn.input_type is LossInputType.LOGPROB


def test_nemo_rl_with_expert_tokens_and_without_entropies(adapter):
    kind, b = adapter("nemo_rl", NEMO).TrapoLossFn, make_batch()
    data = nemo_batch(b)
    expert = torch.arange(9)[None] < torch.tensor([0, 4, 9, 2])[:, None]
    data["expert_mask"] = torch.nn.functional.pad(expert, (1, 0))
    loss, _ = kind()(b.logprobs, data, torch.tensor(3.0), torch.tensor(20.0))
    token = torch.where(expert, trsft(b.logprobs), clipped(b, 0.2, 0.2))
    assert_same(loss, (token * b.mask * data["sample_mask"][:, None]).sum() / 20, b.logprobs)
    with pytest.raises(ValueError, match=r"TrapoLossFn: entropy_coef must be 0, .*; got 0.1"):
        kind(entropy_coef=0.1)


# torchtitan --------------------------------------------------------------------------------------------------


class BaseLoss:
    """torchtitan's, less its compiling."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


def test_torchtitan_leaves_out_tokens_without_a_generator_logprob(adapter):
    kind = adapter("torchtitan", {"torchtitan.components.loss": {"BaseLoss": BaseLoss}}).TrapoLoss
    loss_fn = kind(kind.Config(clip_high=0.28), compile_config=None)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 17, generator=g).requires_grad_()
    labels = torch.randint(0, 17, (30,), generator=g)
    b = SimpleNamespace(advantages=torch.randn(30, generator=g))
    b.logprobs = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    generator = b.logprobs.detach() + 0.4 * torch.randn(30, generator=g)
    generator[3] = torch.nan
    mask = torch.rand(30, generator=g) < 0.7
    mask[3] = True
    loss, metrics = loss_fn(  # trainer.py: three by position, the others by name
        logits, labels, 25, generator_logprobs=generator, advantages=b.advantages, loss_mask=mask
    )
    kept = mask & generator.isfinite()
    token = torch.where(kept, clipped(b, 0.2, 0.28, old=generator.nan_to_num()), 0)
    assert_same(loss, token.sum() / 25, logits, retain=True)
    log_pi = logits.log_softmax(-1)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    assert metrics["trainer/entropy/mean"].item() == pytest.approx((entropy * kept).sum().item() / 25, rel=1e-5)
    ratio = (b.logprobs - generator).exp()
    assert metrics["loss/ratio/max"].item() == pytest.approx(ratio[kept].max().item(), rel=1e-5)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


# Trinity-RFT -------------------------------------------------------------------------------------------------


class TrinityRegistry:
    modules: ClassVar[dict] = {}

    def register_module(self, name):
        return lambda kind: self.modules.setdefault(name, kind)


class PolicyLossFnMeta(type):
    """Trinity's: what a batch must have is read off the signature."""

    def __new__(cls, name, bases, dct):
        parameters = inspect.signature(dct["__call__"]).parameters
        keys = [key for key in parameters if key not in {"self", "kwargs", "logprob"}]
        dct["select_keys"] = property(lambda self: keys)
        return super().__new__(cls, name, bases, dct)


class PolicyLossFn(metaclass=PolicyLossFnMeta):
    def __call__(self, logprob, **kwargs):
        raise NotImplementedError


def test_trinity_gives_the_samples_of_an_expert_the_expert_term(adapter):
    contents = {"POLICY_LOSS_FN": TrinityRegistry(), "PolicyLossFn": PolicyLossFn}
    adapter("trinity", {"trinity.algorithm.policy_loss_fn.policy_loss_fn": contents})
    loss_fn, b = TrinityRegistry.modules["trapo"](backend="verl", clip_high=0.28), make_batch()
    assert loss_fn.select_keys == ["old_logprob", "action_mask", "advantages", "is_expert_mask"]
    expert = torch.tensor([False, True, False, True])
    loss, metrics = loss_fn(
        b.logprobs, old_logprob=b.old, action_mask=b.mask.long(), advantages=b.advantages, is_expert_mask=expert,
        step=3,
    )  # fmt: skip
    token = torch.where(expert[:, None], trsft(b.logprobs), clipped(b, 0.2, 0.28))
    assert_same(loss, (token * b.mask).sum() / b.mask.sum(), b.logprobs)
    assert metrics["expert/prob"] == pytest.approx(b.logprobs.exp()[expert][b.mask[expert]].mean().item(), rel=1e-5)


# slime -------------------------------------------------------------------------------------------------------


def slime_batch(b):
    lengths = b.mask.sum(1).tolist()

    def ragged(values):
        return [row[: lengths[i]] for i, row in enumerate(values)]

    batch = {"log_probs": ragged(b.old), "ref_log_probs": ragged(b.ref), "advantages": ragged(b.advantages)}
    batch |= dict.fromkeys(("unconcat_tokens", "total_lengths"))
    return {**batch, "response_lengths": lengths, "rollout_log_probs": ragged(b.engine)}, ragged, lengths


def slime_arguments(**changes):
    stock = {
        "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "entropy_coef": 0.0, "use_kl_loss": False,
        "kl_loss_coef": 0.0, "kl_loss_type": "k1", "use_rollout_logprobs": False, "rollout_top_p": 1.0,
        "advantage_estimator": "grpo", "use_tis": False, "use_opsm": False, "use_unbiased_kl": False,
    }  # fmt: skip
    return SimpleNamespace(**{**stock, **changes})


REFUSED_BY_SLIME = {
    (("use_kl_loss", True),): r"policy_loss: kl_loss_type must be 'k3'; got 'k1'",
    (("use_tis", True),): "policy_loss: use_tis must be off",
    (("advantage_estimator", "gspo"),): "policy_loss: policy must be set with advantage_estimator='gspo'",
}


@pytest.mark.parametrize("engine", [False, True], ids=["old", "rollout"])
def test_slime_reduces_by_the_mean_that_slime_hands_over(adapter, engine):
    b = make_batch()
    batch, ragged, lengths = slime_batch(b)
    entropy = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, non_loss_data=True,
        top_p_token_ids=None, top_p_token_offsets=None,
    ):  # fmt: skip
        assert with_entropy
        return torch.empty(0), {"log_probs": ragged(b.logprobs), "entropy": ragged(entropy)}

    def sum_of_sample_mean(x):
        return sum(part.mean() for part in x.split(lengths))

    contents = {
        "get_log_probs_and_entropy": get_log_probs_and_entropy,
        "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
    }
    module = adapter("slime", {"slime.backends.megatron_utils.loss": contents})
    settings = {"entropy_coef": 0.02, "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "eps_clip_c": 3.0}
    args = slime_arguments(use_rollout_logprobs=engine, **settings)
    loss, log = module.policy_loss(args, batch, torch.zeros(1, sum(lengths), 5), sum_of_sample_mean)
    delta = b.ref - b.logprobs
    token = clipped(b, 0.2, 0.28, 3.0, old=b.engine if engine else b.old)
    token = token + 0.1 * (delta.exp() - delta - 1) - 0.02 * entropy
    expected = sum(part.mean() for part in ragged(token))
    assert_same(loss, expected, (b.logprobs, entropy))
    assert log["loss"] == loss
    assert all(not value.requires_grad and value.ndim == 0 for value in log.values())
    for changes, message in REFUSED_BY_SLIME.items():
        with pytest.raises(ValueError, match=message):
            module.policy_loss(slime_arguments(**dict(changes)), batch, None, sum_of_sample_mean)
    missing = {**batch, "ref_log_probs": None}
    with pytest.raises(ValueError, match=r"policy_loss: ref_logprobs must be a tensor, which kl_coef=0.1 needs"):
        module.policy_loss(args, missing, None, sum_of_sample_mean)


# ms-swift ----------------------------------------------------------------------------------------------------


class SwiftLoss:
    """swift.loss.BaseLoss, less its abstractness."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


@pytest.mark.parametrize("count", [None, torch.tensor(40)])
def test_ms_swift_predicts_the_next_label_and_divides_as_its_trainer_does(adapter, count):
    losses: dict = {}
    adapter("ms_swift", {"swift.loss": {"BaseLoss": SwiftLoss, "loss_map": losses}})
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 8, 11, generator=g)).requires_grad_()
    labels = torch.randint(0, 11, (3, 8), generator=g)
    labels[0, :4] = -100
    chosen = labels[:, 1:] != -100
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)[chosen]
    formulas = {"trsft": trsft(logp), "dft": -logp.exp().detach() * logp}
    for name, token in formulas.items():
        loss_fn = losses[name](None, None)
        outputs = SimpleNamespace(logits=logits)
        loss = loss_fn(outputs, labels, num_items_in_batch=count, loss_scale=None, trainer=None)
        assert_same(loss, token.sum() / (chosen.sum() if count is None else count), logits, retain=True)
        with pytest.raises(ValueError, match="loss_scale must be None"):
            loss_fn(outputs, labels, loss_scale=torch.ones(3, 8))


def test_no_module_is_longer_than_eighty_lines():
    folder = importlib.import_module("trapo_kernels.integrations").__path__[0]
    for name in ("skyrl", "nemo_rl", "torchtitan", "trinity", "slime", "ms_swift"):
        with open(f"{folder}/{name}.py") as file:
            assert len(file.readlines()) < 80, name
    assert tk.Objective
