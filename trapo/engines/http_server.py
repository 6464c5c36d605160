"""This file speaks JSON over HTTP with a server that may be gone, slow or wrong: every failure is one line that says
how to go on.

The connection goes to the address that is given and nowhere else: no proxy of the environment, no redirect. A key in
VLLM_API_KEY is sent as `vllm serve` wants it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trapo.errors import TrapoError, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 3600.0  # seconds for one whole call; a dead server refuses or resets at once
LARGEST = 2**28  # bytes of an answer


class Server:
    """Calls a server at http(s)://host:port. timeout: seconds for a whole call, however slowly the answer trickles.
    key: of the configuration, that gives the address.

    Raises TrapoError, one line that names the key, for an address of another kind, a server that does not
    answer, an answer that is an error, and one that is not JSON.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT, key: str = "rollout.server_url") -> None:
        self.url, self.timeout, self.key = url.rstrip("/"), timeout, key
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if self._host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
            raise TrapoError(f"{self.key}: must be http://host:port; got {url!r}")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._prefix = parts.path

    def get(self, path: str) -> Any:
        """Returns the answer to GET."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Returns the answer to POST with this JSON; None for an empty one."""
        return self._call("POST", path, json.dumps(body or {}).encode())

    def _call(self, method: str, path: str, data: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            with self._connection() as connection:
                connection.request(method, self._prefix + path, data, headers)
                response = connection.getresponse()
                status, reason, text = response.status, response.reason, response.read(LARGEST + 1)
                if response.length and len(text) <= LARGEST:
                    raise IncompleteRead(text, response.length)
        except (OSError, HTTPException) as error:  # refused, reset in the middle of an answer, timed out
            raise TrapoError(
                f"{self.key}: the vLLM server at {self.url} does not answer ({words_of(error, 200)}); start it "
                "and repeat the command: a run continues from its last checkpoint"
            ) from error
        if not 200 <= status < 300:
            said = _reason(text) or reason
            raise TrapoError(f"{self.key}: {self.url}{path} answered {status}: {said}{_hint(path, status)}")
        if len(text) > LARGEST:
            raise self.wrong(path, f"more than {LARGEST} bytes")
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise self.wrong(path, f"no JSON: {words_of(error, 200)}") from error

    @contextmanager
    def _connection(self) -> Iterator[HTTPConnection]:
        """Opens a connection that is cut when the time is over. (A socket's own timeout is one per read.)"""
        assert self._host is not None
        connection = self._kind(self._host, self._port, timeout=self.timeout)
        over = threading.Event()

        def cut() -> None:
            over.set()
            with suppress(OSError, AttributeError):  # not connected yet, or gone already
                connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        except (OSError, HTTPException) as error:
            if over.is_set():
                raise TimeoutError(f"no whole answer within {self.timeout:g} s") from error
            raise
        finally:
            timer.cancel()
            connection.close()
        if over.is_set():
            raise TimeoutError(f"no whole answer within {self.timeout:g} s")

    def wrong(self, path: str, what: str) -> TrapoError:
        """Returns the error for an answer that is not what was asked for."""
        return TrapoError(f"{self.key}: {self.url}{path} answered what no vLLM server would: {what}")


def _reason(raw: bytes) -> str:
    text = raw.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:200]


def _hint(path: str, code: int) -> str:
    if code == 401:
        return "; give its key in VLLM_API_KEY"
    if path == "/collective_rpc" and code == 404:
        return "; start the server with VLLM_SERVER_DEV_MODE=1"
    if path == "/collective_rpc":
        return "; start the server with --worker-extension-cls trapo.engines.vllm_sync.WorkerExtension"
    return ""
