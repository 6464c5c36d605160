"""The engine `vllm_server` generates by a running `vllm serve`, beyond this process or this machine; docs/vllm.md has
its command line.

Each request is an OpenAI completion whose prompt is token ids and whose answer is token ids with their
log-probabilities: no text on the way, so nothing is tokenised twice. They are all in flight together, `batch_size` at a
time, and the server batches them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from trapo.engines.http_server import Server
from trapo.engines.protocol import Completion, Request, sequence_seed
from trapo.engines.vllm_sync import SharedFolder, Transfer, WeightSync

MODELS, COMPLETIONS = "/v1/models", "/v1/completions"


class VLLMServerEngine:
    """Speaks the engine protocol over HTTP. eos_ids: tokens that end a completion. sync: `folder`, `nccl` or `ipc`
    (vllm_sync.py).

    The server gets the model's weights at once, whatever it was started with. Each answer is checked before anything is
    learnt from it. Raises TrapoError, one line, for a server that does not answer, or answers something else.
    """

    def __init__(
        self, url: str, model: nn.Module, *, eos_ids: Sequence[int], batch_size: int, sync: str, folder: Path
    ) -> None:
        self.server = Server(url)
        self.eos_ids = list(eos_ids)
        self.batch_size = batch_size
        self.name = name_of_model(self.server)
        self.vocab = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        self.sync_weights: WeightSync = (
            SharedFolder(self.server, folder) if sync == "folder" else Transfer(self.server, model, sync)
        )
        self.sync(model)

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        bodies = [self._body(r, temperature, sequence_seed(r, seed, index)) for index, r in enumerate(requests)]
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self._complete, bodies))

    def rest(self) -> None:
        """Does nothing: the server's memory is its own."""

    def sync(self, model: nn.Module) -> None:
        self.sync_weights(model)

    def _body(self, request: Request, temperature: float, seed: int) -> dict[str, Any]:
        """Returns the body of a request, with all settings, so that none is the checkpoint's own."""
        sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return {
            "model": self.name,
            "prompt": list(request.context),
            "add_special_tokens": False,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": self.eos_ids,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # no text to decode
            **sampling,
        }

    def _complete(self, body: dict[str, Any]) -> Completion:
        answer = self.server.post(COMPLETIONS, body)
        try:
            return completion_of(answer, body["max_tokens"], self.vocab)
        except ValueError as error:
            raise self.server.wrong(COMPLETIONS, str(error)) from None


def name_of_model(server: Server) -> str:
    """Returns the name that a server has for what it serves."""
    answer = server.get(MODELS)
    try:
        name = answer["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str):
        raise server.wrong(MODELS, f"no name of a model, but {_shown(answer)}")
    return name


def completion_of(answer: Any, max_tokens: int, vocab: int) -> Completion:
    """Returns the completion that a server's answer holds.

    Raises ValueError, one line, where it is not one of 1 to max_tokens tokens of the vocabulary, each with a
    log-probability, that ended by itself or at the limit.
    """
    try:
        choice = answer["choices"][0]
        tokens, logprobs, reason = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no choice with token_ids, logprobs and finish_reason, but {_shown(answer)}") from None
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason must be 'stop' or 'length'; got {_shown(reason)}")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab for token in tokens):
        raise ValueError(f"token_ids must be whole numbers from 0 to {vocab - 1}; got {_shown(tokens)}")
    if not 1 <= len(tokens) <= max_tokens:
        raise ValueError(f"{len(tokens)} tokens, where 1 to {max_tokens} were asked for")
    if not isinstance(logprobs, list) or not all(_is_logprob(value) for value in logprobs):
        raise ValueError(f"token_logprobs must be numbers of at most 0; got {_shown(logprobs)}")
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(logprobs)} log-probabilities for {len(tokens)} tokens")
    return Completion(tuple(tokens), reason == "stop", tuple(map(float, logprobs)))


def _is_logprob(value: Any) -> bool:
    # Rounding may leave a certain token a little above 0.
    return type(value) in (int, float) and math.isfinite(value) and value <= 1e-3


def _shown(value: Any) -> str:
    return repr(value)[:80].encode(errors="replace").decode()
