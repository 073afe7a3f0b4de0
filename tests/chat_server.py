"""A chat endpoint on this machine that does what each test tells it, and remembers what it was asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Seen:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    stop: threading.Event

    @property
    def question(self) -> str:
        return self.body["messages"][0]["content"]

    def part(self, name: str) -> str:
        """What stands between the tags of request, answer-A or answer-B."""
        return re.search(rf"<{name}-(\w+)>\n(.*?)\n</{name}-\1>", self.question, re.DOTALL)[2]


@dataclass
class Reply:
    """An HTTP answer; `cut` bytes are missing at its end although Content-Length counts them.

    With drip_s one byte is sent every so many seconds.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    drip_s: float = 0.0

    def chunks(self) -> list[bytes]:
        sent = self.body[: len(self.body) - self.cut]
        return [sent[i : i + 1] for i in range(len(sent))] if self.drip_s else [sent]


def said(text: Any) -> Reply:
    """The model said this."""
    return Reply(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def rated(a: Any, b: Any) -> Reply:
    return said(json.dumps({"A": a, "B": b}))


Behaviour = Callable[[Seen], Reply | None]  # None: hang up without a word


@dataclass
class Server:
    url: str
    seen: list[Seen]


@contextmanager
def chat_server(behave: Behaviour) -> Iterator[Server]:
    """Serves until the block ends."""
    seen: list[Seen] = []
    stop, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Seen(path=self.path, headers=dict(self.headers), body=body, stop=stop)
            with lock:
                seen.append(request)
            reply = behave(request)
            if reply is None:
                self.connection.close()
                return
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            for chunk in reply.chunks():
                self.wfile.write(chunk)
                if stop.wait(reply.drip_s):
                    return

        def do_GET(self) -> None:
            with lock:
                seen.append(Seen(path="GET " + self.path, headers=dict(self.headers), body={}, stop=stop))
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a client that stopped waiting
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(url=f"http://127.0.0.1:{server.server_address[1]}/v1", seen=seen)
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def in_turn(*replies: Reply | None) -> Behaviour:
    """These replies one after the other, the last one for ever."""
    left, lock = list(replies), threading.Lock()

    def behave(_: Seen) -> Reply | None:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return behave
