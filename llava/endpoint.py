"""Chat completions of a model behind an OpenAI-compatible endpoint: errors in one line, and the key in none of them."""

import asyncio
import base64
import io
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
from PIL import Image

from llava.records import IMAGE
from llava.runtime import Progress

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6  # of one request, while the endpoint is busy or out of reach
TIMEOUT_S = 120.0  # from the first byte sent to the last one read
LARGEST_REPLY = 1 << 20  # bytes that are read of a reply
FAILED_IN_A_ROW = 20  # questions without a reply, after which the endpoint counts as gone


class EndpointError(ValueError):
    """The endpoint cannot be used as it was given: nothing more is asked."""


class Failed(Exception):
    """No reply, for a reason that may pass: about what, and what happened."""


@dataclass(frozen=True)
class Words:
    """How messages call an endpoint, and the flags that it was given by."""

    name: str
    url: str
    model: str
    key: str


JUDGE = Words("the judge", "--judge_url", "--judge_model", "--judge_key_env")


def messages_of(
    turns: Sequence[tuple[str, str]], images: Sequence[Any], part_of: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation of (role, text) as chat messages, each picture as a part where its text has it.

    `part_of` makes the part of a picture. Raises ValueError if there are more or fewer pictures than places.
    """
    left, messages = iter(images), []
    for role, text in turns:
        first, *others = text.split(IMAGE)
        # Our chat template gives pictures at the start a line each, unless an empty text says that none is meant.
        after = text.replace(IMAGE, "")
        is_tight = not first and bool(others) and after and not after[0].isspace()
        parts = [{"type": "text", "text": first}] if first or is_tight else []
        for piece in others:
            picture = next(left, None)
            if picture is None:
                raise ValueError(f"more places for pictures than the {len(images)} pictures there are")
            parts += [part_of(picture), *([{"type": "text", "text": piece}] if piece else [])]
        messages.append({"role": role, "content": parts})
    if next(left, None) is not None:
        raise ValueError(f"fewer places for pictures than the {len(images)} pictures there are")
    return messages


def url_part(picture: Image.Image, kind: str, **options: Any) -> dict[str, Any]:
    """The part of a picture at its own size, as a file of this `kind` in a URL; `options` of pillow's `save`."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"type": "image_url", "image_url": {"url": data_url(file.getvalue(), kind)}}


def data_url(content: bytes, kind: str) -> str:
    """A picture's file as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _checked_url(url: str, words: Words) -> str:
    """The URL without its end. Raises ValueError, which does not quote it: it may hold a key."""
    try:
        parts = urlsplit(url)
        is_plain = parts.hostname and parts.port != 0 and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        is_plain = False
    if not is_plain or parts.scheme not in ("http", "https") or re.search(r"\s", url):
        raise ValueError(f"{words.url} must be like http://host:port/v1, without user or query; see {words.key}")
    return url.rstrip("/").removesuffix("/chat/completions")


def _key_in(variable: str, words: Words) -> str:
    """The key, empty where the default variable is not set. The name is not quoted: it may be a key, by mistake."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise ValueError(f"{words.key} names an environment variable that is not set: export it, or drop the flag")
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"the key in {variable} holds a space, a line break or a special letter: export it again")
    return key


class _Bounded(httpx.AsyncClient):
    """Requests with a limit on their time, however slowly a reply drips, and on the size of the reply.

    Redirects are not followed: they would hand the key to another host.
    """

    is_reached = False  # whether anything ever answered by HTTP
    words = JUDGE

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Raises TimeoutError and EndpointError, which are final, and httpx.RequestError: then openai tries again."""
        content = bytearray()
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                aclosing(await super().send(request, **options | {"stream": True})) as response,
            ):
                self.is_reached = True
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > LARGEST_REPLY:
                        break
        except httpx.ConnectError as error:
            if self.is_reached:
                raise
            what = f"{request.url}: {self.words.name} cannot be reached ({_innermost(error)})"
            raise EndpointError(f"{what}. Start its server, or correct {self.words.url}") from error
        if response.is_success:
            _content(content, request)
        headers = {name: value for name, value in response.headers.items() if "retry" in name}
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=request)


def _innermost(error: BaseException) -> str:
    """What the operating system says, of an error that libraries wrapped."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)  # asyncio's own text is "Connect call failed"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _content(body: bytes, request: httpx.Request) -> tuple[str, bool]:
    """(message of a chat completion, "" where it is null; whether it ended by itself). Raises httpx.DecodingError."""
    try:
        choice = json.loads(body)["choices"][0]
        content, is_complete = choice["message"]["content"], choice.get("finish_reason") != "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise httpx.DecodingError("the reply is no chat completion", request=request) from error
    return content if isinstance(content, str) else "", is_complete


class Endpoint:
    """Chat completions of one model, with openai's retries. The key is in no message.

    `optional` are fields of a request that an endpoint may refuse; from then on it is asked without them.
    """

    def __init__(
        self, url: str, model: str, key_variable: str = KEY_VARIABLE, words: Words = JUDGE,
        optional: dict[str, Any] | None = None, **fixed: Any,
    ):  # fmt: skip
        self.url, self.model, self.words, self.fixed = _checked_url(url, words), model, words, fixed
        self.optional = {"temperature": 0, **(optional or {})}
        self._key_variable, self._key = key_variable, _key_in(key_variable, words)
        self._http = _Bounded(timeout=None)
        self._http.words = words
        self.client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key or "none", max_retries=TRIES - 1, http_client=self._http
        )

    @property
    def takes_temperature(self) -> bool:
        """Whether it has not refused one yet."""
        return "temperature" in self.optional

    async def reply(self, messages: Sequence[dict], about: str) -> tuple[str, bool]:
        """(text of the reply, "" where it has none; whether it ended by itself and not at its longest).

        Raises Failed, or EndpointError where asking again is no use.
        """
        create = self.client.chat.completions.with_raw_response.create
        sent = dict(self.optional)
        headers = None if self._key else {"Authorization": openai.Omit()}
        try:
            reply = await create(
                model=self.model, messages=list(messages), extra_headers=headers, extra_body=sent, **self.fixed
            )
        except openai.APIStatusError as error:
            refused = [name for name in sent if name in error.response.text]
            if error.status_code not in (400, 422) or not refused:
                raise self._refusal(error, about) from error
            for name in refused:
                if self.optional.pop(name, None) is not None:
                    log.info("%s refuses %s %s: asked without it", self.words.name, name, sent[name])
            return await self.reply(messages, about)
        except (openai.APIConnectionError, TimeoutError) as error:
            is_late = isinstance(error, TimeoutError)
            reason = f"no whole reply in {TIMEOUT_S:.0f} s" if is_late else self.hide(_innermost(error))
            if self._http.is_reached:
                raise self._failed(reason, about) from error
            tries = "one try" if is_late else f"{TRIES} tries"
            what = f"{self.url}: no reply from {self.words.name} in {tries} ({reason})"
            raise EndpointError(f"{what}. Check {self.words.url}") from error
        return _content(reply.http_response.content, reply.http_request)

    def _failed(self, reason: str, about: str) -> Failed:
        return Failed(f"{about}: {self.words.name} did not reply ({reason})")

    def _refusal(self, error: openai.APIStatusError, about: str) -> Exception:
        """What an HTTP error means."""
        code, words = error.status_code, self.words
        if code in (408, 409, 429) or code >= 500:
            return self._failed(f"HTTP {code}", about)
        said = " ".join(self.hide(error.response.text[:20_000]).split())[:200]
        said = f": {said}" if said else ""
        if code in (401, 403):  # its text is not quoted: some endpoints repeat a part of the key
            state = "" if self._key else ", which is not set"
            what, fix = f"{words.name} refuses the key", f"check the variable {self._key_variable}{state} ({words.key})"
        elif code == 404:
            what = f"no such model or address{said}"
            fix = f"check {words.url} (it often ends in /v1) and {words.model} {self.model}"
        else:
            what = f"{words.name} refuses the request about {about}{said}"
            fix = f"check {words.model} {self.model}, whether it takes pictures, and {words.url}"
        return EndpointError(f"{self.url}: {what} (HTTP {code}); {fix}")

    def hide(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text


async def ask_all(
    endpoint: Endpoint, tasks: Sequence[Any], ask: Callable[[Any], Awaitable[Any]], keep: Callable[[Any, Any], None],
    workers: int,
) -> None:  # fmt: skip
    """`ask` about every task, so many at a time, and `keep` each task and what came of it as soon as it is there.

    The first is asked alone: a wrong URL, key or model ends here, after one request and with nothing kept. Of a task
    whose `ask` raises Failed nothing is kept but a line in the log. Raises EndpointError, also after FAILED_IN_A_ROW.
    """
    waiting, failed = iter(tasks), 0

    async def work(count: int | None = None) -> None:
        nonlocal failed
        for task in islice(waiting, count):
            try:
                found = await ask(task)
            except Failed as error:
                log.warning("%s", error)
                failed += 1
            else:
                failed = 0
                keep(task, found)
            if failed == FAILED_IN_A_ROW:
                what = f"{endpoint.url}: no reply about {failed} answers in a row"
                raise EndpointError(f"{what}. Look at the endpoint, then start the same command again")
            if bar is not None:
                bar.update()

    bar = None
    async with endpoint.client:
        await work(1)
        with Progress(total=len(tasks), initial=1, desc=endpoint.words.name, unit="answer") as bar:
            try:
                async with asyncio.TaskGroup() as group:  # where one fails, the others are cancelled
                    for _ in range(workers):
                        group.create_task(work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
