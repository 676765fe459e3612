"""Requests to a server of language models: many at once, tried again where it is busy, restarting or cut short."""

import asyncio
import itertools
import logging
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity


logger = logging.getLogger(__name__)

# Not OPENAI_API_KEY: that one would be sent to whoever answers at the URL.
API_KEY = "HF_ENCDEC_TEACHER_API_KEY"
T = TypeVar("T")
_PASSING = {408, 425, 429, 500, 502, 503, 504, 529}
_MOST_BAD_ANSWERS = 3  # a model that gives NaN for a text does so each time
_LONGEST_WAIT = 60.0  # seconds between two tries


class Refused(ValueError):
    """The server answers, and does not do what it is asked: `status` is the HTTP status code."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class BadAnswer(ValueError):
    """An answer that cannot be used; the same request is sent twice more before this is raised."""


class _NoAnswer(Exception):
    """None came, or one that says to try again, `after` some seconds if it says when."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class HttpClient:
    """Sends JSON to a server and reads JSON, from a thread of its own, so that the caller can go on meanwhile.

    A request that gets no answer, half of one, or a status that says to try again (429, 500, 503, ...) is sent again
    after exponentially growing, random pauses (full jitter, as `tenacity.wait_random_exponential`), or after the time
    in `Retry-After`. The API key is read from the environment variable HF_ENCDEC_TEACHER_API_KEY, sent as a bearer
    token, and kept out of all messages.

    Args:
        url: of the server, such as `http://localhost:8000`; a `/v1` at its end is dropped.
        requests: most requests in flight.
        timeout: seconds to wait for one answer.
        patience: seconds in which a request is tried again; a large model takes minutes to load after a restart.

    Raises:
        ValueError: the URL is none of http or https, or has a user, a password, a query or a fragment in it.
    """

    def __init__(self, url: str, *, requests: int = 32, timeout: float = 300.0, patience: float = 900.0):
        self.url = _checked(url)
        self.requests, self.patience = requests, patience
        key = os.environ.get(API_KEY, "").strip()
        self._hide: Callable[[str], str] = (lambda text: text.replace(key, "***")) if key else (lambda text: text)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=requests, max_keepalive_connections=requests),
        )
        self._free = asyncio.Semaphore(requests)
        self._loop = asyncio.new_event_loop()
        # A daemon: an interpreter that wants to end does not wait for a server that does not answer.
        threading.Thread(target=self._loop.run_forever, name="teacher-requests", daemon=True).start()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        read: Callable[[Any], T] = lambda answer: answer,
        patience: float | None = None,
    ) -> "Future[T]":
        """What `read` makes of the JSON that comes back, in the future.

        The future raises `Refused` where the server does not want to, `BadAnswer` where `read` does so three times,
        and OSError where there was no answer within `patience`.

        Args:
            path: begins with a slash.
            body: sent with POST; without one it is a GET.
            read: called with the parsed answer; raises BadAnswer where that is not what was asked for.
            patience: in place of the client's.
        """
        patience = self.patience if patience is None else patience
        return asyncio.run_coroutine_threadsafe(self._ask(path, body, read, patience), self._loop)

    async def _ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T], patience: float) -> T:
        bad = itertools.count(1)

        def is_bad_for_good(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            return isinstance(state.outcome.exception(), BadAnswer) and next(bad) == _MOST_BAD_ANSWERS

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((_NoAnswer, BadAnswer)),
            wait=_pause,
            stop=tenacity.stop_before_delay(patience) | is_bad_for_good,  # type: ignore[operator]  # any callable will do
            before_sleep=self._tell,
            reraise=True,
        )
        async with self._free:
            try:
                return await tries(self._once, path, body, read)
            except _NoAnswer as error:
                message = f"the server {self.url} gave no answer to {path} within {patience:.0f} s: {error}"
                raise OSError(message) from None

    async def _once(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = await self._http.request("GET" if body is None else "POST", path, json=body)
        except httpx.TransportError as error:
            # None of its chain: the request in it has the key.
            raise _NoAnswer(self._hide(f"{type(error).__name__}: {error}")) from None
        if response.status_code in _PASSING:
            raise _NoAnswer(f"status {response.status_code}: {self._said(response)}", _retry_after(response))
        if response.status_code in (401, 403):
            raise Refused(
                f"the server {self.url} does not accept the API key for {path} (status {response.status_code}): put "
                f"the one it was started with into the environment variable {API_KEY}.",
                response.status_code,
            )
        if not response.is_success:
            said = f"status {response.status_code}: {self._said(response)}"
            raise Refused(f"the server {self.url} refuses {path}, {said}", response.status_code)
        try:
            answer = response.json()
        except ValueError:
            raise BadAnswer(f"the server {self.url} gave no JSON for {path}: {self._said(response)!r}") from None
        try:
            return read(answer)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            said = self._said(response)
            raise BadAnswer(
                f"the server {self.url} gave another form of answer for {path} ({type(error).__name__}: {error}): "
                f"{said!r}"
            ) from None

    def _said(self, response: httpx.Response) -> str:
        """The message of an error, in the form of OpenAI's API or any other, or how the answer begins."""
        text = response.text
        try:
            error = response.json()["error"]
            text = error["message"] if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError):
            pass
        text = self._hide(" ".join(text.split()))
        return text if len(text) <= 300 else f"{text[:300]} ..."

    def _tell(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        logger.log(
            logging.WARNING if state.attempt_number > 2 else logging.INFO,
            "%s: %s; trying again in %.1f s",
            self.url,
            state.outcome.exception(),
            state.upcoming_sleep,
        )


def _checked(url: str) -> str:
    if set(url) & set("@?#"):
        raise ValueError(
            "the URL of the server has a user, a password, a query or a fragment in it, which would end up in files "
            f"and logs: give scheme, host and path alone, and the key in the environment variable {API_KEY}."
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server {url!r} is not a URL: give one such as http://localhost:8000.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _pause(state: tenacity.RetryCallState) -> float:
    assert state.outcome is not None
    after = getattr(state.outcome.exception(), "after", None)
    if after is not None:
        return after + random.uniform(0, 1)  # or all that were sent away would come back at once
    return tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT)(state)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; a date, which hardly any of these servers gives, is left to the back-off."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
