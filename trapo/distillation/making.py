"""A run's tutor is made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem
from trapo.distillation.heads import ModelTeacher, Privileged
from trapo.distillation.how import COLUMNS, Distillation
from trapo.distillation.listed import ColumnTeacher, ServerTeacher, refuse_temperature
from trapo.distillation.tutor import Teacher, Tutor
from trapo.errors import TrapoError
from trapo.models import agreement
from trapo.models.loading import check_positions, head_of, load_trained
from trapo.settings.groups import ModelConfig

if TYPE_CHECKING:
    from trapo.learner import Learner


def make_tutor(
    how: Distillation,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[EncodedProblem],
    model: ModelConfig,
) -> Tutor:
    """Returns the tutor of a run's learner. problems: of data.train.

    Raises TrapoError, one line, for a teacher that cannot be had or does not go with the student.
    """
    if how.top:
        refuse_temperature(learner.temperature)
    return Tutor(how, _teacher(how, learner, tokenizer, problems, model), learner.temperature, learner.ranks)


def _teacher(
    how: Distillation,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[EncodedProblem],
    model: ModelConfig,
) -> Teacher:
    vocab = len(head_of(learner.model).weight)
    if how.teacher == COLUMNS:
        return ColumnTeacher(problems, vocab)
    if how.served:
        return ServerTeacher(how.teacher, top_k=how.top_k, vocab=vocab, ranks=learner.ranks)
    reread, found = None, learner.model
    if how.privileged:
        reread = Privileged(tokenizer, how.template)
        check_positions(found, reread.longest(problems) + learner.max_response_tokens)
    if (own := how.own_model(model)) is not None:
        found = _load(own, learner, tokenizer)
    return ModelTeacher(
        found,
        precision=learner.precision,
        budget=learner.train.micro_batch_tokens,
        pad_id=learner.pad_id,
        reread=reread,
        ranks=learner.ranks,
    )


def _load(config: ModelConfig, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns a frozen model with the student's vocabulary, sharded as the student is."""
    try:
        model, own = load_trained(
            config, learner.ranks, learner.precision, change=lambda whole: whole.requires_grad_(False)
        )
    except TrapoError as error:
        raise TrapoError(f"distill.teacher: {error}") from error
    mine, theirs = tokenizer.get_vocab(), own.get_vocab()
    if mine != theirs:
        token = min(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])
        raise TrapoError(
            f"distill.teacher: {config.path!r} has another vocabulary than model.path; the first that differs is id "
            f"{token[1]}, {token[0]!r}; a teacher's ids must mean the same"
        )
    agreement.check_model(model, learner.precision, learner.pad_id)
    return model
