"""Generation by a running `vllm serve`, beyond this process or this machine; docs/vllm.md has its command line.

Each request is an OpenAI completion whose prompt is token ids and whose answer is token ids with their
log-probabilities: no text on the way, so nothing is tokenised twice. They are all in flight together, `batch_size` at a
time, and the server batches them.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from torch import nn

from trapo.errors import TrapoError
from trapo.rollout import Completion, Request, sequence_seed
from trapo.rollout.vllm_sync import SharedFolder, Transfer, WeightSync

TIMEOUT = 3600.0  # seconds for one completion or one weight sync; a dead server refuses or resets at once


class VLLMServerEngine:
    """Engine protocol over HTTP. eos_ids: tokens that end a completion. sync: `folder`, `nccl` or `ipc` (vllm_sync.py).

    The server gets the model's weights at once, whatever it was started with.
    """

    def __init__(
        self, url: str, model: nn.Module, *, eos_ids: Sequence[int], batch_size: int, sync: str, folder: Path
    ) -> None:
        self.server = Server(url)
        self.eos_ids = list(eos_ids)
        self.batch_size = batch_size
        self.name = self.server.get("/v1/models")["data"][0]["id"]
        self.sync_weights: WeightSync = (
            SharedFolder(self.server, folder) if sync == "folder" else Transfer(self.server, model, sync)
        )
        self.sync(model)

    def generate(self, requests: Sequence[Request], *, temperature: float, seed: int) -> list[Completion]:
        bodies = [self._body(r, temperature, sequence_seed(r, seed, index)) for index, r in enumerate(requests)]
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self._complete, bodies))

    def rest(self) -> None:
        """The server's memory is its own."""

    def sync(self, model: nn.Module) -> None:
        self.sync_weights(model)

    def _body(self, request: Request, temperature: float, seed: int) -> dict[str, Any]:
        """All settings are given, so that none is the checkpoint's own."""
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
        choice = self.server.post("/v1/completions", body)["choices"][0]
        logprobs = choice["logprobs"]["token_logprobs"]
        return Completion(tuple(choice["token_ids"]), choice["finish_reason"] == "stop", tuple(logprobs))


class Server:
    """JSON over HTTP with one-line errors."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        return self._call(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        return self._call(urllib.request.Request(self.url + path, data, headers, method="POST"))

    def _call(self, request: urllib.request.Request) -> Any:
        path = request.full_url.removeprefix(self.url)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise TrapoError(
                f"rollout.server_url: {self.url}{path} answered {error.code}: {_reason(error)}{_hint(path, error.code)}"
            ) from error
        except (OSError, HTTPException) as error:  # refused, reset in the middle of an answer, timed out
            reason = getattr(error, "reason", None) or error
            raise TrapoError(
                f"rollout.server_url: the vLLM server at {self.url} does not answer ({reason}); start it and repeat "
                "the command: a run continues from its last checkpoint"
            ) from error
        return json.loads(text) if text else None


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(text.split())[:200] or str(error.reason)


def _hint(path: str, code: int) -> str:
    if path == "/collective_rpc" and code == 404:
        return "; start the server with VLLM_SERVER_DEV_MODE=1"
    if path == "/collective_rpc":
        return "; start the server with --worker-extension-cls trapo.rollout.vllm_sync.WorkerExtension"
    return ""
