"""Re-ranking by any chat endpoint that speaks OpenAI's API (``POST base_url/chat/completions``), by configuration.

The titles of the retained history and of the candidates leave the device for that endpoint. No user id does, and no
forgotten or withdrawn item is among them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedrec.errors import ConfigError
from unlearning.rerankers import prompt
from unlearning.rerankers.base import Answer, Catalogue, Float64, Question, Usage, whole_number
from unlearning.rerankers.endpoint import LOOPBACK, MAX_WAIT_S, Endpoint, NoAnswer, Unusable


@dataclass(frozen=True)
class Chat:
    """The endpoint and how it is asked.

    Attributes:
        base_url: up to and including the version, ``http://localhost:8000/v1``.
        model: its name at the endpoint.
        api_key_env: the environment variable that holds the key; null: none is sent.
        timeout: seconds, of one request.
        retries: repetitions after the first request, for time-outs, HTTP 429 and 5xx, and unreadable answers.
        backoff: seconds before the first repetition, doubled before each further one; ``Retry-After`` may lengthen it.
        max_concurrency: requests under way at once.
        max_tokens: of an answer; 50 scores take about 400.
        json_mode: ask for ``response_format={"type": "json_object"}``; false for endpoints that do not know it.
        allow_http: send to other machines without encryption, in a network of your own.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    max_concurrency: int = 4
    max_tokens: int = 2048
    json_mode: bool = True
    allow_http: bool = False

    def __post_init__(self) -> None:
        for name, least in (("retries", 0), ("max_concurrency", 1), ("max_tokens", 1)):
            if not whole_number(getattr(self, name), least):
                raise ValueError(f"{name}={getattr(self, name)!r}: write a whole number, {least} or more")
        for name, zero in (("timeout", False), ("backoff", True)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (0 < value < math.inf or (zero and value == 0)):
                raise ValueError(f"{name}={value!r}: write seconds, {'0 or more' if zero else 'more than 0'}")
        for name in ("json_mode", "allow_http"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: write true or false")
        for name in ("base_url", "model", "api_key_env"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{name}={value!r}: write a text, or null")

    def check(self, where: str) -> None:
        if self.base_url is None or self.model is None:
            missing = "base_url" if self.base_url is None else "model"
            raise ConfigError(
                f"{where}.chat.{missing} is not set; reranker=chat needs a model and "
                "its base_url (http://localhost:8000/v1, say)"
            )
        try:
            parts = urlsplit(self.base_url)
            well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            raise ConfigError(f"{where}.chat.base_url is no address; write http(s)://host[:port]/v1") from None
        if not well_formed or parts.query or parts.fragment or parts.username or parts.password:
            # Not shown: it may hold a key.
            raise ConfigError(
                f"{where}.chat.base_url is not of the form http(s)://host[:port]/v1; "
                "a key belongs into the environment variable that api_key_env names"
            )
        if parts.scheme == "http" and parts.hostname not in LOOPBACK and not self.allow_http:
            raise ConfigError(
                f"{where}.chat.base_url={self.base_url} would send histories and the key unencrypted; "
                "write https://, or set allow_http=true for a network of your own"
            )
        key = None if self.api_key_env is None else os.environ.get(self.api_key_env, "")
        if key is not None and (not key.strip() or not key.isascii() or not key.isprintable()):
            raise ConfigError(
                f"{where}.chat.api_key_env={self.api_key_env}: that environment variable holds no key; "
                f"export {self.api_key_env}=…, or set api_key_env=null"
            )

    def prepare(self, catalogue: Catalogue, seed: int, where: str) -> ChatRanking:
        self.check(where)
        return ChatRanking(self, catalogue, seed, where)


@dataclass(frozen=True)
class ChatRanking:
    """A chat endpoint that is asked about a catalogue."""

    settings: Chat
    catalogue: Catalogue
    seed: int
    where: str

    @property
    def bytes_per_device(self) -> int:
        return 0

    @property
    def notes(self) -> Sequence[str]:
        host = urlsplit(self.settings.base_url or "").netloc
        return (
            f"Candidates were re-ranked by the chat model {self.settings.model} at {host}, which was shown the titles "
            "of users' retained histories and of their candidates, and nothing else of them.",
        )

    def rank(self, questions: Sequence[Question]) -> list[Answer]:
        settings = self.settings
        # Read when it is used, so that it is part of no object that might be printed or saved.
        key = os.environ.get(settings.api_key_env) if settings.api_key_env else None
        url = f"{(settings.base_url or '').rstrip('/')}/chat/completions"
        endpoint = Endpoint(url, key.strip() if key else None, settings.timeout)
        with ThreadPoolExecutor(settings.max_concurrency) as pool:
            futures = [pool.submit(self._answer, endpoint, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except Unusable as error:
                raise ConfigError(f"{self.where}.chat: {urlsplit(url).netloc} cannot be used: {error}") from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, endpoint: Endpoint, question: Question) -> Answer:
        titles = [self.catalogue.texts[item] for item in question.candidates]
        order = prompt.listing(titles)
        liked = [self.catalogue.texts[item] for item in question.history]
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": prompt.messages(liked, [titles[at] for at in order]),
            "temperature": 0,
            "seed": self.seed % 2**31,
            "max_tokens": self.settings.max_tokens,
        }
        if self.settings.json_mode:
            body["response_format"] = {"type": "json_object"}
        usage, cause = Usage(), ""
        for attempt in range(1 + self.settings.retries):
            try:
                reply = endpoint.post(body, [*liked, *titles])
                usage += _usage(reply, body)
                listed = prompt.parse(_content(reply), len(titles), [*liked, *titles])
                scores: Float64 = np.empty(len(titles))
                scores[order] = listed
                return Answer(scores, usage=usage)
            except prompt.BadAnswer as error:
                cause, wait = str(error), 0.0
            except NoAnswer as error:
                usage += _usage(None, body)
                cause = str(error)
                if error.wait_s is None:
                    break
                wait = error.wait_s
            if attempt < self.settings.retries:
                time.sleep(min(max(wait, self.settings.backoff * 2.0**attempt), MAX_WAIT_S))
        return Answer(None, cause, usage)


def _content(reply: Any) -> str:
    """The text of the first choice of a chat completion."""
    try:
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise prompt.BadAnswer("what came is no chat completion (choices[0].message.content is missing)") from None
    if finish == "length":
        raise prompt.BadAnswer("the answer was cut off; raise max_tokens")
    if not isinstance(text, str):
        raise prompt.BadAnswer("the answer has no text")
    return text


def _usage(reply: Any, body: dict[str, Any]) -> Usage:
    told = reply.get("usage") if isinstance(reply, dict) else None

    def tokens(name: str) -> int:
        value = told.get(name) if isinstance(told, dict) else None
        return value if whole_number(value, 0) and isinstance(value, int) else 0

    sent = sum(len(message["content"].encode()) for message in body["messages"])
    return Usage(1, tokens("prompt_tokens"), tokens("completion_tokens"), sent)
