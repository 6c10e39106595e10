"""A chat endpoint on this machine that speaks the API as the re-ranker uses it, and refuses what is not the API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unlearning.rerankers.prompt import INSTRUCTIONS


@dataclass(frozen=True)
class Reply:
    """What goes out: ``body`` as it is (bytes) or as JSON; ``pieces`` sends it byte by byte, so many seconds apart."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    pieces: float = 0.0


def completion(content: Any, finish: str = "stop", prompt_tokens: int = 11, completion_tokens: int = 7) -> Reply:
    """A chat completion whose text is ``content``."""
    return Reply(
        {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "small",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
            ],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 18},
        }
    )  # fmt: skip


def by_length(question: dict[str, Any]) -> Reply:
    """The shorter the title, the better; length ties by number."""
    shown = question["candidates"]
    order = sorted(shown, key=lambda number: (len(shown[number]), int(number)))
    return completion(json.dumps({"scores": {number: 100 - place for place, number in enumerate(order)}}))


Answering = Callable[[dict[str, Any]], Reply]


@dataclass
class ChatServer:
    """What was asked, and what is answered: ``script`` first, one reply a request, then ``answer``."""

    url: str = ""
    answer: Answering = by_length
    script: list[Reply] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busiest: int = 0
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The user messages, read."""
        return [json.loads(body["messages"][1]["content"]) for body in self.bodies]

    def reply(self, path: str, headers: dict[str, str], raw: bytes) -> Reply:
        if path != "/v1/chat/completions":
            return Reply({"error": {"message": f"no such path {path}"}}, 404)
        body = json.loads(raw)
        roles = [message["role"] for message in body["messages"]]
        if headers.get("Content-Type") != "application/json" or roles != ["system", "user"]:
            return Reply({"error": {"message": "not a request of this API"}}, 400)
        with self._lock:
            self.bodies.append(body)
            self.raw.append(raw)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            scripted = self.script.pop(0) if self.script else None
        assert body["messages"][0]["content"] == INSTRUCTIONS
        return scripted or self.answer(json.loads(body["messages"][1]["content"]))

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A server on a free port of this machine, gone afterwards."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with state.working():
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                reply = state.reply(self.path, dict(self.headers.items()), raw)
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                time.sleep(reply.delay)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.pieces:
                    for at in range(len(content)):
                        self.wfile.write(content[at : at + 1])
                        self.wfile.flush()
                        time.sleep(reply.pieces)
                self.wfile.write(content if not reply.pieces else b"")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had enough

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
