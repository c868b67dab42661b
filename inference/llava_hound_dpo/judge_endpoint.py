"""Chat completions of a model behind an OpenAI-compatible endpoint: errors in one line, and the key in none of them."""

import asyncio
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6  # of one request, while the endpoint is busy or out of reach
TIMEOUT_S = 120.0  # from the first byte sent to the last one read
LARGEST_REPLY = 1 << 20  # bytes that are read of a reply


class JudgeError(ValueError):
    """The endpoint cannot be used as it was given: nothing more is asked."""


class Failed(Exception):
    """No reply, for a reason that may pass: what happened."""


def _checked_url(url: str) -> str:
    """The URL without its end. Raises ValueError, which does not quote it: it may hold a key."""
    try:
        parts = urlsplit(url)
        is_plain = parts.hostname and parts.port != 0 and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        is_plain = False
    if not is_plain or parts.scheme not in ("http", "https") or re.search(r"\s", url):
        raise ValueError("--judge_url must be like http://host:port/v1, without user or query; see --judge_key_env")
    return url.rstrip("/").removesuffix("/chat/completions")


def _key_in(variable: str) -> str:
    """The key, empty where the default variable is not set. The name is not quoted: it may be a key, by mistake."""
    key = os.environ.get(variable, "").strip()
    if not key and variable != KEY_VARIABLE:
        raise ValueError("--judge_key_env names an environment variable that is not set: export it, or drop the flag")
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"the key in {variable} holds a space, a line break or a special letter: export it again")
    return key


class _Bounded(httpx.AsyncClient):
    """Requests with a limit on their time, however slowly a reply drips, and on the size of the reply.

    Redirects are not followed: they would hand the key to another host.
    """

    is_reached = False  # whether anything ever answered by HTTP

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Raises TimeoutError and JudgeError, which are final, and httpx.RequestError: then openai tries again."""
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
            what = f"{request.url}: the judge cannot be reached ({_innermost(error)})"
            raise JudgeError(f"{what}. Start its server, or correct --judge_url") from error
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


def _content(body: bytes, request: httpx.Request) -> str:
    """The message of a chat completion, "" where it is null. Raises httpx.DecodingError if it is none."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise httpx.DecodingError("the reply is no chat completion", request=request) from error
    return content if isinstance(content, str) else ""


class Endpoint:
    """Chat completions of one model, with openai's retries. The key is in no message."""

    def __init__(self, url: str, model: str, key_variable: str = KEY_VARIABLE):
        self.url, self.model = _checked_url(url), model
        self._key_variable, self._key = key_variable, _key_in(key_variable)
        self._http = _Bounded(timeout=None)
        self.client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key or "none", max_retries=TRIES - 1, http_client=self._http
        )
        self.takes_temperature = True  # until it refuses one

    async def chat(self, messages: Sequence[dict], about: str) -> str:
        """Text of the reply, "" where it has none. Raises Failed, or JudgeError where asking again is no use."""
        create = self.client.chat.completions.with_raw_response.create
        temperature = 0 if self.takes_temperature else openai.omit
        headers = None if self._key else {"Authorization": openai.Omit()}
        try:
            reply = await create(
                model=self.model, messages=list(messages), temperature=temperature, extra_headers=headers
            )
        except openai.APIStatusError as error:
            if error.status_code != 400 or temperature != 0 or "temperature" not in error.response.text:
                raise self._refusal(error, about) from error
            log.info("the judge refuses temperature 0: asked without it")
            self.takes_temperature = False
            return await self.chat(messages, about)
        except (openai.APIConnectionError, TimeoutError) as error:
            is_late = isinstance(error, TimeoutError)
            reason = f"no whole reply in {TIMEOUT_S:.0f} s" if is_late else self.hide(_innermost(error))
            if self._http.is_reached:
                raise Failed(reason) from error
            what = f"{self.url}: no reply from the judge in {'one try' if is_late else f'{TRIES} tries'} ({reason})"
            raise JudgeError(f"{what}. Check --judge_url") from error
        return _content(reply.http_response.content, reply.http_request)

    def _refusal(self, error: openai.APIStatusError, about: str) -> Exception:
        """What an HTTP error means."""
        code = error.status_code
        if code in (408, 409, 429) or code >= 500:
            return Failed(f"HTTP {code}")
        said = " ".join(self.hide(error.response.text[:20_000]).split())[:200]
        said = f": {said}" if said else ""
        if code in (401, 403):  # its text is not quoted: some endpoints repeat a part of the key
            state = "" if self._key else ", which is not set"
            what, fix = "the judge refuses the key", f"check the variable {self._key_variable}{state} (--judge_key_env)"
        elif code == 404:
            what = f"no such model or address{said}"
            fix = f"check --judge_url (it often ends in /v1) and --judge_model {self.model}"
        else:
            what = f"the judge refuses the request about {about}{said}"
            fix = f"check --judge_model {self.model}, whether it takes pictures, and --judge_url"
        return JudgeError(f"{self.url}: {what} (HTTP {code}); {fix}")

    def hide(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text
