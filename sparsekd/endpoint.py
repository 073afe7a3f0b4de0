"""An OpenAI-compatible chat endpoint over the standard library's urllib: one question, one answer, or a clear refusal.

What the network and the server do wrong is told apart by what helps: waiting (429, 5xx, timeouts, broken
connections, answers cut short), another question (other 4xx: `Unanswered`), or another setting (`ModelError`).
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .checks import check_at_least
from .errors import ModelError, RecipeError

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_BYTES = 4 * 2**20  # of an answer; a judge's is a few kilobytes
LONGEST_WAIT_S = 300.0  # a server that asks for more is not waited for: the run can be taken up later
LONGEST_BACKOFF_S = 60.0


class Unanswered(ModelError):
    """This question got no answer; another may."""


class _Again(Exception):
    """A failure that may pass, and how many seconds the server asked to wait (0: it did not say)."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: up to and including the version, as in http://localhost:8000/v1.
        model: what the server calls the model.
        key: sent as a bearer token; never shown, never written.
        settings: more fields of each request, such as temperature and max_tokens.
        retries: how often a failed request is sent again.
        timeout_s: seconds without a byte, and in all, before a request counts as failed.
        backoff_s: the longest first wait; it doubles with each failure.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    retries: int = 5
    timeout_s: float = 120.0
    backoff_s: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said, and how many requests that took."""

    text: str
    requests: int


def open_endpoint(url: str, model: str, *, api_key_env: str | None = KEY_VARIABLE, **how: Any) -> Endpoint:
    """An `Endpoint` with its key from the environment; nothing is sent.

    Args:
        api_key_env: the environment variable with the key; unset means no key, None never to look. A key of the
            default variable is most likely a public service's, so it does not go unencrypted to other machines.
        how: the other attributes of `Endpoint`.

    Raises:
        RecipeError: not an http(s) address, one with a password or a query in it, or a key that must not go there.
    """
    check_at_least(0, retries=how.get("retries"), backoff_s=how.get("backoff_s"))
    check_at_least(0.001, timeout_s=how.get("timeout_s"))
    parts = _parts(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RecipeError(
            f"endpoint={_bare(parts)} has a password or a query in it, which files would keep; "
            "put the key into an environment variable and name it with api_key_env="
        )
    key = _key(api_key_env)
    if key and api_key_env == KEY_VARIABLE and parts.scheme == "http" and not _is_local(str(parts.hostname)):
        raise RecipeError(
            f"endpoint={url} would carry the key of {KEY_VARIABLE} unencrypted to {parts.hostname}; use https, "
            "api_key_env=null to send none, or another variable with the key of that server"
        )
    return Endpoint(url=url.rstrip("/"), model=model, key=key, **how)


def complete(endpoint: Endpoint, messages: list[dict[str, str]], sleep: Callable[[float], Any] = time.sleep) -> Answer:
    """The model's answer to a chat, asked up to 1 + retries times.

    Between two requests it waits as long as Retry-After says, else between half and all of
    backoff_s · 2^failures (at most a minute), so that many clients do not come back at once.

    Args:
        sleep: waits that many seconds; it may raise to give up.

    Raises:
        Unanswered: no answer after all retries, or the server refuses this very question.
        ModelError: the server refuses us: no right, no such model, an address that moved.
    """
    body = json.dumps({"model": endpoint.model, "messages": messages} | endpoint.settings).encode()
    for failures in range(endpoint.retries + 1):
        try:
            return Answer(text=_hide(_ask(endpoint, body), endpoint), requests=failures + 1)
        except _Again as again:
            reason, wait_s = _hide(str(again), endpoint), again.wait_s
        if failures < endpoint.retries and wait_s <= LONGEST_WAIT_S:
            sleep(wait_s or _backoff(endpoint.backoff_s, failures))
            continue
        asked = f" and asks to wait {wait_s:.0f} s" if wait_s else ""
        raise Unanswered(f"{endpoint.url}: {reason} after {failures + 1} requests{asked}")
    raise AssertionError("unreachable")


def _backoff(first_s: float, failures: int) -> float:
    return min(LONGEST_BACKOFF_S, first_s * 2**failures) * random.uniform(0.5, 1.0)


# -- one request


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would turn the POST into a GET and hand our key to whatever host the answer names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(endpoint: Endpoint, body: bytes) -> str:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sparsekd"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(f"{endpoint.url}/chat/completions", data=body, headers=headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    deadline = time.monotonic() + endpoint.timeout_s
    try:
        with opener.open(request, timeout=endpoint.timeout_s) as answer:
            return _content(_read(answer, deadline))
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(endpoint, error) from None
    except TimeoutError:
        raise _Again(f"no answer within {endpoint.timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise _Again(f"no answer within {endpoint.timeout_s:g} s") from None
        raise _Again(f"the connection failed ({type(reason).__name__}: {reason})") from None


def _read(answer: Any, deadline: float) -> bytes:
    """The whole body; a server that drips bytes meets the deadline, an endless one the size limit."""
    chunks, size = [], 0
    while chunk := answer.read1(2**16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise _Again(f"the answer is longer than {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:  # read1 does not complain about a connection closed early
        raise _Again(f"the connection closed {answer.length} bytes before the answer's end")
    return b"".join(chunks)


def _content(body: bytes) -> str:
    """choices[0].message.content; "" for null, which servers send when a model said nothing."""
    try:
        value = json.loads(body)
        content = value["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        raise _Again(f"the answer is not JSON: {_start(body)}") from None
    except (KeyError, IndexError, TypeError):
        raise _Again(f"the answer has no choices[0].message.content: {_start(body)}") from None
    if not isinstance(content, str | None):
        raise _Again(f"the answer's content is {type(content).__name__}, not text")
    return content or ""


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    """What an HTTP status means for us."""
    said = _said(error)
    reason = f"HTTP {error.code}{': ' * bool(said)}{said}"
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        return _Again(reason, _retry_after(error.headers.get("Retry-After")))
    reason = _hide(reason, endpoint)
    if error.code in (401, 403):
        way_out = "put a valid key into the environment variable that api_key_env names"
        return ModelError(f"{endpoint.url} refuses access: {reason}; {way_out}")
    if error.code in (404, 405):
        way_out = (
            f"check that it serves judge_model={endpoint.model} and that the address ends before /chat/completions"
        )
        return ModelError(f"{endpoint.url}: {reason}; {way_out}")
    if error.code < 400:
        place = _hide(str(error.headers.get("Location")), endpoint)
        return ModelError(f"{endpoint.url} sends us on to {place} (HTTP {error.code}); give the final endpoint=")
    return Unanswered(f"{endpoint.url}: {reason}")


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, shortened."""
    try:
        body = error.read(2**14)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        message = json.loads(body)["error"]
        return " ".join(str(message.get("message", message) if isinstance(message, dict) else message).split())[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _start(body) if body.strip() else ""


def _retry_after(value: str | None) -> float:
    """Seconds to wait: the header is a number of them or a date; 0 for none, a bad one or one in the past."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # so written, a NaN is 0


def _start(body: bytes) -> str:
    text = " ".join(body[:2000].decode(errors="replace").split())
    return repr(text[:120]) if text else "nothing"


# -- the key


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(
            f"the key in the environment variable {variable} has characters that no HTTP header can carry"
        )
    return key or None


def _hide(text: str, endpoint: Endpoint) -> str:
    """Servers like to repeat a key that they refuse."""
    return text.replace(endpoint.key, "***") if endpoint.key else text


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _parts(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # a ValueError where it is no number
    except ValueError as error:
        raise RecipeError(f"endpoint= is not an address ({error}); give one such as http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(f"endpoint={_bare(parts)!r} is not an address such as http://localhost:8000/v1")
    return parts


def _bare(parts: urllib.parse.SplitResult) -> str:
    """An address without what may be secret in it."""
    host = (parts.netloc or "").rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
