"""A chat endpoint that misbehaves is waited for, given up on, or refused, each in words that help."""

from __future__ import annotations

import email.utils
import json
import time

import pytest
from chat_server import Reply, chat_server, in_turn, said

from sparsekd import endpoint
from sparsekd.endpoint import Unanswered, complete, open_endpoint
from sparsekd.errors import ModelError, RecipeError

ASK = [{"role": "user", "content": "hello"}]
KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def _no_proxy_and_no_key(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def ask(server, sleep=None, **how):
    waits = []
    opened = open_endpoint(server.url, "judge-1", **{"retries": 2, "timeout_s": 5.0} | how)
    return complete(opened, ASK, sleep or waits.append), waits


def test_a_question_is_one_post_of_model_messages_and_settings():
    """The body holds nothing else, and without a key there is no Authorization."""
    with chat_server(in_turn(said("hi"))) as server:
        answer, waits = ask(server, settings={"temperature": 0})
    (seen,) = server.seen
    assert (answer.text, answer.requests, waits) == ("hi", 1, [])
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {"model": "judge-1", "messages": ASK, "temperature": 0}
    assert "Authorization" not in seen.headers


@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=429),
        Reply(status=500),
        Reply(status=503, body=b"<html>overloaded</html>", headers={"Content-Type": "text/html"}),
        Reply(status=408),
        None,
        Reply(body=b'{"choices": [{"message": {"con'),
        Reply(body=said("hi").body, cut=5),
        Reply(body=b"<html>wait</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b""),
        Reply(body=b"\xff\xfe"),
        Reply(body=b"[" * 100_000),
        Reply(body=b'{"error": {"message": "busy"}}'),
        Reply(body=b'{"choices": []}'),
        Reply(body=b"[1]"),
        said([{"type": "text"}]),
    ],
)
def test_what_may_pass_is_asked_again(failure):
    """After one such failure the next answer counts, and both requests are counted."""
    with chat_server(in_turn(failure, said("hi"))) as server:
        answer, waits = ask(server)
    assert (answer.text, answer.requests, len(waits)) == ("hi", 2, 1)


def test_a_null_content_is_an_empty_answer():
    """A model that said nothing did answer; whether that will do is not the endpoint's affair."""
    with chat_server(in_turn(said(None))) as server:
        assert ask(server)[0].text == ""


def test_a_slow_answer_is_a_failure_after_the_timeout():
    """timeout_s bounds the wait, and its value is told."""

    def slow(request):
        request.stop.wait(5)
        return said("late")

    with chat_server(slow) as server:
        started = time.monotonic()
        with pytest.raises(Unanswered, match=r"no answer within 0.2 s after 2 requests"):
            ask(server, timeout_s=0.2, retries=1)
        assert time.monotonic() - started < 3


def test_a_dripping_answer_meets_the_deadline():
    """Bytes that keep coming do not prolong timeout_s."""
    with (
        chat_server(in_turn(Reply(body=said("x" * 400).body, drip_s=0.02))) as server,
        pytest.raises(Unanswered, match=r"no answer within 0\.3 s"),
    ):
        ask(server, timeout_s=0.3, retries=0)


def test_waits_double_with_jitter_and_stop_at_a_minute():
    """Wait k lies between half and all of backoff_s · 2^k, and never beyond 60 s."""
    with chat_server(in_turn(Reply(status=500))) as server:
        waits: list[float] = []
        with pytest.raises(Unanswered, match="HTTP 500 after 9 requests"):
            ask(server, waits.append, retries=8, backoff_s=1.0)
    bounds = [min(60, 2**k) for k in range(8)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert any(wait not in (bound, bound / 2) for wait, bound in zip(waits, bounds, strict=True))


def test_retry_after_is_honoured_in_seconds_and_as_a_date():
    """The server's own wait replaces ours; a date in the past or nonsense does not."""
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    replies = [Reply(status=429, headers={"Retry-After": value}) for value in ("7", soon, past, "soon", "nan")]
    with chat_server(in_turn(*replies, said("hi"))) as server:
        _, waits = ask(server, retries=5, backoff_s=0.5)
    assert waits[0] == 7.0
    assert 25 < waits[1] <= 30
    assert all(0 < wait <= 0.5 * 2**k for k, wait in enumerate(waits[2:], 2))


def test_a_wait_of_an_hour_is_not_waited_for():
    """Beyond five minutes the question is given up, and the wait is told."""
    with (
        chat_server(in_turn(Reply(status=429, headers={"Retry-After": "3600"}))) as server,
        pytest.raises(Unanswered, match="after 1 requests and asks to wait 3600 s"),
    ):
        ask(server)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, Unanswered, "HTTP 400: too long"),
        (401, ModelError, "refuses access: HTTP 401: too long; put a valid key"),
        (404, ModelError, "check that it serves judge_model=judge-1"),
    ],
)
def test_a_refusal_is_not_asked_again(status, kind, words):
    """Other 4xx do not pass by waiting: one request, and the server's words in the message."""
    body = json.dumps({"error": {"message": "too long"}}).encode()
    with chat_server(in_turn(Reply(status=status, body=body))) as server, pytest.raises(kind, match=words) as error:
        ask(server)
    assert len(server.seen) == 1
    assert (type(error.value) is Unanswered) == (kind is Unanswered)


def test_a_redirect_is_not_followed(monkeypatch):
    """urllib would carry the key to the host it is sent to."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(in_turn(said("hi"))) as other:
        reply = Reply(status=302, headers={"Location": f"{other.url}/chat/completions"})
        with chat_server(in_turn(reply)) as server, pytest.raises(ModelError, match=r"give the final endpoint="):
            ask(server)
        assert other.seen == []


def test_the_key_goes_into_the_header_and_nowhere_else(monkeypatch):
    """Not into repr, not into messages, not into answers, even when the server repeats it."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    echo = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    with chat_server(
        in_turn(said(f"your key is {KEY}"), Reply(status=401, body=echo), Reply(status=500, body=echo))
    ) as s:
        opened = open_endpoint(s.url, "judge-1", retries=0)
        assert KEY not in repr(opened)
        assert complete(opened, ASK).text == "your key is ***"
        for _ in range(2):
            with pytest.raises(ModelError, match=r"bad key \*\*\*") as error:
                complete(opened, ASK)
            assert KEY not in str(error.value)
    assert s.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(s.seen[0].body)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(monkeypatch):
    """http.client would print it."""
    monkeypatch.setenv("JUDGE_KEY", "sk-a\nb")
    with pytest.raises(RecipeError, match="environment variable JUDGE_KEY") as error:
        open_endpoint("http://localhost/v1", "m", api_key_env="JUDGE_KEY")
    assert "sk-a" not in str(error.value)


def test_the_public_key_does_not_go_unencrypted_to_other_machines(monkeypatch):
    """A variable that the user named for that server may; null sends none; https and this machine are fine."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("LAN_KEY", "lan")
    with pytest.raises(RecipeError, match=r"unencrypted to 10\.0\.0\.5"):
        open_endpoint("http://10.0.0.5:8000/v1", "m")
    assert open_endpoint("http://10.0.0.5:8000/v1", "m", api_key_env="LAN_KEY").key == "lan"
    assert open_endpoint("http://10.0.0.5:8000/v1", "m", api_key_env=None).key is None
    for url in ("https://api.example.org/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:80/v1"):
        assert open_endpoint(url, "m").key == KEY


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "is not an address"),
        ("ftp://host/v1", "is not an address"),
        ("http:///v1", "is not an address"),
        ("http://host:port/v1", "is not an address"),
        ("http://[::1/v1", "is not an address"),
        ("https://me:hunter2@host/v1", "a password or a query"),
        ("https://host/v1?api-key=hunter2", "a password or a query"),
    ],
)
def test_an_address_that_files_may_not_keep_is_refused(url, words):
    """Whatever may be secret in it does not come back in the message."""
    with pytest.raises(RecipeError, match=words) as error:
        open_endpoint(url, "m")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("setting", [{"retries": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_settings_out_of_range_are_refused(setting):
    """They are named."""
    with pytest.raises(RecipeError, match=next(iter(setting))):
        open_endpoint("http://localhost/v1", "m", **setting)


def test_nobody_there_is_told_with_the_address():
    """A refused connection names the endpoint and what the system said."""
    with pytest.raises(Unanswered, match=r"127\.0\.0\.1:9/v1: the connection failed \(ConnectionRefusedError"):
        complete(open_endpoint("http://127.0.0.1:9/v1", "m", retries=1), ASK, lambda _: None)


def test_an_endless_answer_is_cut_short(monkeypatch):
    """No more than MAX_BYTES are read."""
    monkeypatch.setattr(endpoint, "MAX_BYTES", 1000)
    with (
        chat_server(in_turn(said("x" * 100_000))) as server,
        pytest.raises(Unanswered, match="longer than 1000 bytes"),
    ):
        ask(server, retries=0)
