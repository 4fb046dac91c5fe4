"""Rewards over HTTP, from a server on this machine that does what each test wants."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trueup.errors import RewardError
from trueup.rewards import endpoint
from trueup.rewards.rewards import Rewards


@pytest.fixture
def serve(monkeypatch):
    """Starts a server; each request is answered by the next of ``answers`` (the last one again and again)."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    servers = []

    def start(*answers):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                answers[min(len(requests), len(answers)) - 1](self, body)

            def do_GET(self):
                requests.append((self.path, dict(self.headers), None))
                self.send_error(404)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(content, status=200, **headers):
    def respond(handler, body):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content.encode())

    return respond


def lengths(handler, body):
    answer(json.dumps({"scores": [len(each) for each in body["completions"]]}))(handler, body)


def error_of(url, given, timeout=5.0) -> str:
    with pytest.raises(RewardError) as caught:
        Rewards.load([url], timeout=timeout).score(given)
    assert url.partition("#")[0] in str(caught.value)
    return str(caught.value)


def test_samples_go_and_scores_come(serve, samples, monkeypatch):
    monkeypatch.delenv("TRUEUP_REWARD_TOKEN", raising=False)
    url, requests = serve(lengths)
    rewards = Rewards.load([url])
    assert rewards.score(samples(["a", "bé"], answer=["x", None])).total.tolist() == [1, 2]
    path, headers, body = requests[0]
    assert path == "/score"
    assert "Authorization" not in headers
    assert body == {
        "prompts": ["question 0", "question 1"],
        "completions": ["a", "bé"],
        "completion_ids": [[0], [0, 1]],
        "columns": {"answer": ["x", None]},
    }
    assert rewards.names[0].startswith("127.0.0.1:")


def test_null_is_none(serve, samples):
    url, _ = serve(answer('{"scores": [null, 2]}'))
    assert str(Rewards.load([url, "regex:."]).score(samples(["a", "b"])).each["regex"]) == "[1. 1.]"
    assert Rewards.load([url, "regex:."]).score(samples(["a", "b"])).total.tolist() == [1, 3]


def test_the_token_comes_from_the_environment(serve, samples, monkeypatch):
    url, requests = serve(lengths)
    monkeypatch.setenv("TRUEUP_REWARD_TOKEN", "abc")
    monkeypatch.setenv("MY_TOKEN", "xyz")
    Rewards.load([url, f"{url}#MY_TOKEN"]).score(samples(["a"]))
    assert [headers["Authorization"] for _, headers, _ in requests] == ["Bearer abc", "Bearer xyz"]
    with pytest.raises(RewardError, match="the environment variable NO_TOKEN is not set"):
        Rewards.load([f"{url}#NO_TOKEN"])


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(status, serve, samples):
    url, requests = serve(answer("later", status), answer("later", status), lengths)
    assert Rewards.load([url]).score(samples(["abc"])).total.tolist() == [3]
    assert len(requests) == 3


def test_a_connection_that_breaks_is_tried_again(serve, samples):
    def breaks(handler, body):
        handler.connection.shutdown(socket.SHUT_RDWR)

    url, requests = serve(breaks, lengths)
    assert Rewards.load([url]).score(samples(["abc"])).total.tolist() == [3]
    assert len(requests) == 2


def test_a_server_that_comes_up_late_is_waited_for(serve, samples, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    class Late(BaseHTTPRequestHandler):
        def do_POST(self):
            lengths(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *arguments):
            pass

    def come_up():
        time.sleep(0.15)
        with ThreadingHTTPServer(("127.0.0.1", port), Late) as server:
            server.handle_request()

    thread = threading.Thread(target=come_up)
    thread.start()
    assert Rewards.load([f"http://127.0.0.1:{port}"], timeout=30).score(samples(["abc"])).total.tolist() == [3]
    thread.join()


def test_nobody_there(samples):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    message = error_of(url, samples(["a"]), timeout=0.8)
    assert "can't be reached" in message
    assert "(tried for 0.8 s)" in message


@pytest.mark.parametrize("slowness", ["silent", "dripping"])
def test_a_slow_server_is_given_up(slowness, serve, samples):
    done = threading.Event()

    def slow(handler, body):
        handler.send_response(200)
        handler.end_headers()
        while not done.wait(0.05):
            if slowness == "dripping":
                handler.wfile.write(b" ")

    url, requests = serve(slow)
    try:
        assert "no answer within 0.4 s" in error_of(url, samples(["a"]), timeout=0.4)
    finally:
        done.set()
    assert len(requests) == 1, "a request that may have arrived is not sent twice"


@pytest.mark.parametrize(
    ("content", "status", "what"),
    [
        ("no such thing", 404, "answers with status 404: no such thing"),
        ("", 500, "answers with status 500"),
        ("<html>", 200, "answers '<html>'"),
        ('{"score": [1]}', 200, "answers '{\"score\": [1]}'"),
        ("[1]", 200, "answers '[1]'"),
        ('{"scores": 1}', 200, "gives int as scores"),
    ],
)
def test_another_answer_is_an_error_at_once(content, status, what, serve, samples):
    url, requests = serve(answer(content, status))
    assert what in error_of(url, samples(["a"]))
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"scores": [1, 2]}', "gives 2 scores for 1 samples"),
        ('{"scores": [NaN]}', "gives nan"),
        ('{"scores": ["1"]}', "gives str '1'"),
    ],
)
def test_scores_are_checked_like_all_others(content, what, serve, samples):
    url, _ = serve(answer(content))
    with pytest.raises(RewardError, match=f"{what}") as caught:
        Rewards.load([url]).score(samples(["a"]))
    assert "sample 0 (data.jsonl:1" in str(caught.value)


def test_the_token_does_not_follow_a_redirection(serve, samples, monkeypatch):
    monkeypatch.setenv("TRUEUP_REWARD_TOKEN", "abc")
    other, stolen = serve(lengths)
    url, _ = serve(answer("", 302, Location=other))
    assert "status 302" in error_of(url, samples(["a"]))
    assert stolen == []


def test_an_answer_without_end_is_cut(serve, samples, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1000)
    url, _ = serve(answer("[" * 5000))
    assert "more than 1,000 bytes" in error_of(url, samples(["a"]))


def test_samples_that_json_does_not_know(serve, samples):
    url, _ = serve(lengths)
    assert "can't be written as JSON" in error_of(url, samples(["a"], answer=[{1, 2}]))
