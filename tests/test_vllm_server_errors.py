"""A server that is not there, or goes away in the middle of an answer. tests/vllm_cpu has a real one."""

import socket
import threading
import time

import pytest

from trapo.engines.http_server import Server
from trapo.engines.protocol import Completion
from trapo.engines.vllm_server import completion_of
from trapo.errors import TrapoError


def listener(answer):
    """The URL of a socket that answers one request with these bytes and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):  # hanging up on an unread request would reset the connection
            pass
        connection.close()
        listening.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def unused():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (unused, "Connection refused"),
        (lambda: listener(b""), "closed connection without response"),
        (lambda: listener(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), "IncompleteRead"),
    ],
)
def test_a_server_that_is_gone_is_one_line_that_says_how_to_go_on(url, reason):
    where = url()
    with pytest.raises(TrapoError, match=rf"^rollout\.server_url: the vLLM server at {where} does not answer") as error:
        Server(where).post("/v1/completions", {"prompt": [1]})
    assert reason in str(error.value)
    assert "continues from its last checkpoint" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("404 Not Found", b'{"detail": "Not Found"}', "start the server with VLLM_SERVER_DEV_MODE=1"),
        (
            "500 Oops",
            b'{"error": {"message": "no attribute trapo_reload"}}',
            "answered 500: no attribute trapo_reload; ",
        ),
    ],
)
def test_a_server_without_weight_sync_is_told_how_to_have_it(status, body, expected):
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with pytest.raises(TrapoError) as error:
        Server(listener(answer)).post("/collective_rpc", {"method": "trapo_reload"})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:8000", "http://", "ftp://h:1", "http://h:port", "http://h:1?x=1", ""]
)
def test_an_address_of_another_kind_is_refused(url):
    with pytest.raises(TrapoError, match=r"^rollout\.server_url: must be http://host:port; got"):
        Server(url)


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect", "401 Unauthorized"])
def test_an_answer_that_leads_elsewhere_is_one_line(status):
    answer = f"HTTP/1.1 {status}\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".encode()
    with pytest.raises(TrapoError, match=rf"answered {status[:3]}: ") as error:
        Server(listener(answer)).post("/v1/completions", {})
    assert ("VLLM_API_KEY" in str(error.value)) == status.startswith("401")


def test_the_key_of_the_environment_is_sent_and_its_proxies_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", unused())
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    seen = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        seen.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert Server(f"http://127.0.0.1:{listening.getsockname()[1]}").get("/v1/models") == {}
    thread.join()
    assert b"Authorization: Bearer secret" in seen[0]


def trickling(first):
    """The URL of a server that sends `first` and then a byte every 50 ms, for ever."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        try:
            connection.sendall(first)
            while True:
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    "first", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n{"]
)
def test_an_answer_that_trickles_for_ever_ends(first):
    with pytest.raises(TrapoError, match=r"does not answer \(no whole answer within 0\.5 s\)"):
        Server(trickling(first), timeout=0.5).post("/v1/completions", {})


GOOD = {"token_ids": [1, 2], "logprobs": {"token_logprobs": [-0.5, 0]}, "finish_reason": "stop"}


def test_a_good_answer_is_a_completion():
    assert completion_of({"choices": [GOOD]}, 2, 3) == Completion((1, 2), True, (-0.5, 0.0))
    assert not completion_of({"choices": [GOOD | {"finish_reason": "length"}]}, 2, 3).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "abort"}, "finish_reason must be"),
        ({"finish_reason": None}, "finish_reason must be"),
        ({"finish_reason": ["stop"]}, "finish_reason must be"),
        ({"token_ids": [1, 2, 1]}, "3 tokens, where 1 to 2 were asked for"),
        ({"token_ids": []}, "0 tokens"),
        ({"token_ids": [1, 3]}, "from 0 to 2"),
        ({"token_ids": [1, -1]}, "from 0 to 2"),
        ({"token_ids": [1, True]}, "from 0 to 2"),
        ({"token_ids": [1, 2.0]}, "from 0 to 2"),
        ({"token_ids": "12"}, "from 0 to 2"),
        ({"token_ids": None}, "from 0 to 2"),
        ({"logprobs": {"token_logprobs": [-0.5]}}, "1 log-probabilities for 2 tokens"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "numbers of at most 0"),
        ({"logprobs": {"token_logprobs": [-0.5, -float("inf")]}}, "numbers of at most 0"),
        ({"logprobs": {"token_logprobs": [-0.5, 1.0]}}, "numbers of at most 0"),
        ({"logprobs": {"token_logprobs": [-0.5, None]}}, "numbers of at most 0"),
        ({"logprobs": {"token_logprobs": [-0.5, True]}}, "numbers of at most 0"),
        ({"logprobs": {"token_logprobs": {"0": -0.5}}}, "numbers of at most 0"),
        ({"logprobs": None}, "no choice with"),
    ],
)
def test_a_malformed_completion_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        completion_of({"choices": [GOOD | change]}, 2, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [None, [], {}, {"choices": []}, {"choices": [None]}, {"choices": {}}, "text", 3])
def test_an_answer_of_another_shape_is_refused(answer):
    with pytest.raises(ValueError, match="no choice with"):
        completion_of(answer, 2, 3)


@pytest.mark.parametrize("body", ["{", "[" * 100_000, "\udcff", ""])
def test_an_answer_that_is_not_json_is_one_line(body):
    raw = body.encode(errors="surrogateescape")
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw
    server = Server(listener(answer))
    if not raw:
        assert server.post("/reset") is None
        return
    with pytest.raises(TrapoError, match="answered what no vLLM server would: no JSON") as error:
        server.post("/v1/completions", {})
    assert "\n" not in str(error.value)
