"""This file keeps what the base model could do before: texts whose likelihood, or problems whose accuracy, a run should
not lose."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trapo.data.encode import EncodedProblem
from trapo.data.sampling import load_problem_set
from trapo.errors import TrapoError
from trapo.evaluation.likelihood import likelihood
from trapo.runs.ranks import ALONE, Ranks
from trapo.settings.groups import DataConfig

PIECE = 1024  # tokens of a text that are looked at together


@dataclasses.dataclass(frozen=True)
class Prior:
    """Holds texts, as token ids, or problems; one of them is empty."""

    texts: tuple[tuple[int, ...], ...] = ()
    problems: tuple[EncodedProblem, ...] = ()

    def nll(self, model: PreTrainedModel, precision: str, ranks: Ranks = ALONE) -> tuple[float | None, int]:
        """Returns the negative log-likelihood of a token of the texts, or of the problems' expert traces, in nats at
        temperature 1, and the number of tokens; (None, 0) where there is none. Ranks split the work."""
        pairs: list[tuple[Sequence[int], Sequence[int]]] = [((), ids) for ids in self.texts]
        pairs += [(p.prompt_ids, trace.token_ids) for p in self.problems for trace in p.traces]
        found = likelihood(model, pairs, precision, ranks)
        return (None, 0) if found is None else (found.nll, found.tokens)


def load_prior(
    path: str | None, data: DataConfig, tokenizer: PreTrainedTokenizerBase, log: Callable[[str], None]
) -> Prior | None:
    """Returns eval.prior as token ids: a .txt file, a .jsonl file of rows with a `text`, or problems in any form of
    data.eval. None where there is none.

    Raises TrapoError for a file that cannot be read, or holds nothing.
    """
    if path is None:
        return None
    texts = list(_texts(Path(path)))
    if not texts:
        return Prior(problems=tuple(load_problem_set(data, path, tokenizer, log)))
    pieces: list[tuple[int, ...]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [tuple(ids[i : i + PIECE]) for i in range(0, len(ids), PIECE)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise TrapoError(f"eval.prior: {path} holds no text of at least two tokens")
    return Prior(texts=tuple(pieces))


def _texts(path: Path) -> Iterator[str]:
    """Yields the texts of a file of texts; nothing for one of problems."""
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            for line in path.read_bytes().split(b"\n"):
                row = json.loads(line) if line.strip() else {}
                if isinstance(row, dict) and isinstance(row.get("text"), str) and "prompt" not in row:
                    yield row["text"]
    except (OSError, ValueError) as error:
        raise TrapoError(f"eval.prior: {path} cannot be read: {str(error).splitlines()[0]}") from error
