"""A server that is not there, or goes away in the middle of an answer. tests/vllm_cpu has a real one."""

import socket
import threading

import pytest

from trapo.errors import TrapoError
from trapo.rollout.vllm_server import Server


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
