"""HTTP to a chat endpoint: time limits, retries with back-off, and no secret in any message."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import IO, Any
from urllib.parse import urlsplit

from unlearning.rerankers.prompt import shown

MAX_ANSWER_BYTES = 2**20
MAX_WAIT_S = 60.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: Answers that no repetition changes, and what to do about each.
SETTLED = {
    401: "it does not accept the key; check the environment variable that api_key_env names",
    403: "it does not allow this; check the key and the model",
    404: "there is nothing at this address, or no such model; check base_url (…/v1, as a rule) and model",
    405: "it takes no POST there; check base_url (…/v1, as a rule)",
}


class Unusable(Exception):
    """No request to this endpoint can succeed with these settings."""


class NoAnswer(Exception):
    """This request got no answer. ``wait_s`` is how long the endpoint asked to be left alone; None: do not repeat."""

    def __init__(self, cause: str, wait_s: float | None) -> None:
        super().__init__(cause)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. ``timeout`` bounds one request from its start to the last byte of its answer, in seconds."""

    url: str
    key: str | None = field(repr=False)
    timeout: float

    def post(self, body: Mapping[str, Any], titles: Sequence[str]) -> Any:
        """The JSON that the endpoint answers to ``body``.

        Args:
            titles: somebody's history, no word of which an error message may show.

        Raises:
            Unusable, NoAnswer.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fedrec"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                raw = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, titles) from None
        except TimeoutError:
            raise NoAnswer(f"no answer within {self.timeout:g} s", 0.0) from None
        except (OSError, HTTPException) as error:  # URLError, a connection reset, an answer cut short
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise NoAnswer(f"no answer within {self.timeout:g} s", 0.0) from None
            raise NoAnswer(
                f"the connection failed ({self._shown(str(reason) or type(reason).__name__, titles)})", 0.0
            ) from None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            said = self._shown(raw.decode("utf-8", "replace"), titles)
            raise NoAnswer(f"what came is not JSON: {said}", 0.0) from None

    @property
    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if urlsplit(self.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # what stays on this machine must not pass a proxy
        return urllib.request.build_opener(*handlers)

    def _shown(self, text: str, titles: Sequence[str]) -> str:
        return shown(text, titles, self.key or "")

    def _refused(self, error: urllib.error.HTTPError, titles: Sequence[str]) -> Exception:
        status = error.code
        if 300 <= status < 400:
            there = self._shown(error.headers.get("Location") or "", titles)
            return Unusable(f"it answered HTTP {status}: it has moved to {there}; write that in base_url")
        try:
            raw = _read(error, time.monotonic() + self.timeout)
            said = self._shown(raw.decode("utf-8", "replace"), titles)
        except (OSError, HTTPException):
            said = "nothing"
        if status in SETTLED:
            return Unusable(f"it answered HTTP {status}: {SETTLED[status]} ({said})")
        repeat = status in (408, 409, 425, 429) or status >= 500
        return NoAnswer(f"HTTP {status}: {said}", _asked_to_wait(error.headers) if repeat else None)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would carry the key to wherever it is sent."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


def _read(response: Any, deadline: float) -> bytes:
    """The whole body; TimeoutError past ``deadline``, however slowly it trickles in."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if getattr(response, "length", None):  # of what was announced, so many bytes did not come
        raise OSError("the answer broke off")
    return b"".join(parts)


def _asked_to_wait(headers: Message) -> float:
    """``Retry-After`` in seconds, at most :data:`MAX_WAIT_S`; 0 when it is not there or is a date."""
    try:
        return min(max(float(headers.get("Retry-After", "0")), 0.0), MAX_WAIT_S)
    except ValueError:
        return 0.0
