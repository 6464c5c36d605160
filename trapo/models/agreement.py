"""Does this model do what the trainer takes for granted? One short text decides, before anything is trained.

The trainer runs the decoder alone, pads or packs sequences, checkpoints layers and takes the head's weight for the
whole way to the logits. That is right for most families and silently wrong for some. So two short sequences go through
the model as it is and through the trainer's way. What disagrees is refused in one line, or done in a slower way that
agrees.

Differences of hidden states are a mean over tokens of |a - b| / |b|: one token that a router sends to another expert
because of rounding does not decide, a sequence that sees its neighbours does.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trapo.errors import TrapoError
from trapo.models import prefix_tree
from trapo.models.finite import not_finite
from trapo.models.precision import compute_in
from trapo.models.sharding import as_forward, reshard
from trapo_kernels.integrations.transformers import decoder_of, fit_head, linear_head

LENGTHS = (9, 14)  # of the two sequences
# Of hidden states. Another order of summation makes 1e-6 in float32; in 16 bits some layers' rounding makes 1e-2, and
# sequences that see each other some 0.5.
TOLERANCE = {"float32": 1e-3, "16 bits": 0.05}
HEAD_TOLERANCE = {"float32": 1e-4, "16 bits": 2e-2}  # of logits, by the largest: both sides make the same product


FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of a model's forward


@dataclasses.dataclass(frozen=True)
class Probe:
    """Holds the two sequences and what the model itself makes of them, each alone."""

    ids: list[Tensor]  # [1, n] each
    hidden: list[Tensor]  # [n, D] each
    low: bool  # whether it was computed in 16 bits

    @property
    def tolerance(self) -> float:
        return TOLERANCE["16 bits" if self.low else "float32"]


def check_model(model: PreTrainedModel, precision: str, pad_id: int = 0) -> None:
    """Compare the fused head on padded sequences with the model's own logits; `linear_head` knows the head's transform
    afterwards. Raises TrapoError where they disagree. On sharded models all ranks must ask."""

    def compare() -> None:
        with computing(model, precision):
            probe(model, pad_id)

    as_probe(model, compare)


def computing(model: PreTrainedModel, precision: str) -> AbstractContextManager:
    """Returns what forwards of this module run in: the weights' own dtype, which tells most, but for flash attention,
    which takes 16 bits alone. precision: a value of train.precision."""
    return compute_in(precision if "flash" in (model.config._attn_implementation or "") else "float32", model)


def as_probe(model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    """Returns function(), called in evaluation mode, as if it were the model's forward; shards are shards again
    afterwards. What is not a TrapoError becomes one: a model that fails on the short text fails on every other."""
    try:
        with torch.no_grad():
            return as_forward(model, function)
    except TrapoError:
        raise
    except FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrapoError(f"{name_of(model)} fails on a short text: {type(error).__name__}: {reason}") from error
    finally:
        reshard(model)


def probe(model: PreTrainedModel, pad_id: int) -> Probe:
    """Runs both sequences through the model, alone and as the trainer pads them. Raises TrapoError where that
    disagrees."""
    ids = probe_ids(model)
    short, hidden = ids[0], []
    # By `forward`, not by a call: this is within the root's own forward where weights are sharded.
    hook = decoder_of(model).register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        logits = model.forward(input_ids=short).logits
    finally:
        hook.remove()
    alone = hidden[-1] if hidden else hidden_states(model, short)
    if logits.isnan().any() and (name := not_finite(model)):
        raise TrapoError(f"model.path: weights of {name_of(model)} are NaN or infinite (the first: {name})")
    head = linear_head(model).cast(alone)
    low = bool({alone.dtype, logits.dtype, head.weight.dtype} & {torch.bfloat16, torch.float16})
    error = fit_head(model, head, alone.to(head.weight.dtype), logits)
    if not error <= HEAD_TOLERANCE["16 bits" if low else "float32"]:
        raise TrapoError(
            f"{name_of(model)} cannot be trained: its logits are not those of its output head with bias, factor and "
            f"soft-cap (they differ by {error:.2g} of the largest), so the fused loss would be another model's"
        )
    # Both what is padded with and other tokens: an encoder may leave out the former by itself.
    rest = ids[1][:, LENGTHS[0] :]
    followed = [torch.cat([short, tail], 1) for tail in (torch.full_like(rest, pad_id), rest)]
    rows = hidden_states(model, torch.cat([*followed, ids[1]]))
    found = Probe(ids, [alone[0], rows[2]], low)
    error = max(difference(row[: LENGTHS[0]], alone[0]) for row in rows[:2])
    if not error <= found.tolerance:
        raise TrapoError(
            f"{name_of(model)} cannot be trained: a sequence's hidden states change by {error:.2g} of their size with "
            "what follows it; accepted: causal language models, where no token sees later ones"
        )
    return found


def probe_ids(model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Returns the text: token ids from the lower half of the vocabulary, where no family has its special tokens."""
    vocabulary = int(cast(Tensor, model.get_input_embeddings().weight).shape[0])
    generator = torch.Generator().manual_seed(0)
    low, high = min(vocabulary // 16, vocabulary - 2), max(vocabulary // 2, 2)
    made = [torch.randint(low, high, (1, n), generator=generator) for n in lengths]
    return [ids.to(model.device) for ids in made]


def hidden_states(model: PreTrainedModel, ids: Tensor, **layout: Any) -> Tensor:
    """Returns [B, T, D], what the head is applied to."""
    return decoder_of(model)(input_ids=ids, use_cache=False, **layout).last_hidden_state


def tree_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, sight: Tensor, places: Tensor) -> Tensor:
    """Returns [sum of lengths, D]: hidden states of the sequences of a prefix_tree.Forest, one after the other."""
    mask = prefix_tree.attention_mask(model, sight, positions)
    return hidden_states(model, ids, position_ids=positions, attention_mask=mask).flatten(0, 1)[places]


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the mean over tokens of |found - expected| / |expected|, of [n, D] each."""
    found, expected = found.double(), expected.double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).mean())


def layout_names(model: PreTrainedModel) -> frozenset[str]:
    """Returns those of `Batch.layout`'s names that the decoder's forward takes."""
    parameters = inspect.signature(decoder_of(model).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return LAYOUT
    return LAYOUT & parameters.keys()


LAYOUT = frozenset({"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


def packed_names(model: PreTrainedModel, found: Probe, layout: dict[str, Any]) -> frozenset[str] | None:
    """Returns the arguments of a decoder by which the model keeps packed sequences apart; None where it does not, which
    is said once. layout: all of them, for one row of the two sequences."""
    names, errors = layout_names(model), []
    for chosen in dict.fromkeys((names, names & {"position_ids"})):
        told = {name: value for name, value in layout.items() if name in chosen}
        try:
            rows = hidden_states(model, torch.cat(found.ids, 1), **told)[0].split(LENGTHS)
        except FAILURES as failure:
            errors.append(f"its forward fails: {(str(failure).strip() or '-').splitlines()[0]}")
            continue
        error = max(difference(row, alone) for row, alone in zip(rows, found.hidden, strict=True))
        if error <= found.tolerance:
            return chosen
        errors.append(f"hidden states change by {error:.2g} of their size")
    say(f"train.packing: {name_of(model)} does not keep packed sequences apart ({errors[0]}); they are padded instead")
    return None


def shares_beginnings(model: PreTrainedModel, found: Probe, pad_id: int) -> bool:
    """Returns whether sequences that begin alike can be computed as a tree (models/prefix_tree.py); where not, it is
    said."""
    if (implementation := model.config._attn_implementation) not in prefix_tree.TAKE_A_MASK:
        return False  # flash attention takes no mask; its sequences are packed
    short, long = (ids[0].tolist() for ids in found.ids)
    branch = [*long[: LENGTHS[0] - 4], *short[-4:]]  # begins as the longer one does
    trees = [sorted([branch, long]), [short]]
    forest = prefix_tree.plant(trees, pad_id)
    try:
        alone = {tuple(branch): hidden_states(model, found.ids[0].new_tensor([branch]))[0]}
        alone |= {tuple(ids[0].tolist()): hidden for ids, hidden in zip(found.ids, found.hidden, strict=True)}
        planted = (forest.input_ids, forest.position_ids, forest.sight, forest.places)
        states = tree_states(model, *(t.to(model.device) for t in planted))
    except FAILURES as failure:
        reason = f"with a mask of {implementation} attention its forward fails: {str(failure).strip() or '-'}"
    else:
        sequences = [tuple(sequence) for tree in trees for sequence in tree]
        parts = states.split([len(s) for s in sequences])
        error = max(difference(part, alone[s]) for part, s in zip(parts, sequences, strict=True))
        if error <= found.tolerance:
            return True
        reason = f"in a tree hidden states change by {error:.2g} of their size"
    say(f"train.share_prefixes: {name_of(model)} computes each rollout's prompt anew ({reason.splitlines()[0]})")
    return False


def check_checkpointing(model: PreTrainedModel, found: Probe) -> None:
    """Raises TrapoError where gradient checkpointing changes what the model computes."""
    with torch.enable_grad():
        hidden = hidden_states(model, found.ids[0])[0].detach()
    error = difference(hidden, found.hidden[0])
    if not error <= found.tolerance:
        raise TrapoError(
            f"model.gradient_checkpointing: with it the hidden states of {name_of(model)} change by {error:.2g} of "
            "their size; accepted for this family: false"
        )


def say(message: str) -> None:
    """Tell the user, once a run and by the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("trapo").warning("trapo: %s", message)


def name_of(model: PreTrainedModel) -> str:
    """Returns how a message calls it."""
    return f"model type {model.config.model_type} ({type(model).__name__})"
