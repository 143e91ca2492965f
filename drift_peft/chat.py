"""A server that speaks OpenAI's chat completions (vLLM, llama.cpp, a provider): asked again where it fails, and never
waited for without an end."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from httpx2 import Response

LARGEST = 2**28  # bytes of an answer, in which each token may have hundreds of log probabilities
LONGEST = 10  # of a whole answer, in times of the longest silence
LONGEST_WAIT = 600.0  # seconds between two tries, whatever the server asks for
PASSING = (408, 409, 425, 429)  # refusals that may end by themselves, as those from 500 on
MOVED = (301, 302, 303, 307, 308)


class NoCompletion(Exception):
    """A question gets none. Says why.

    Attributes:
        status: with which the server refuses the question; None where it was asked until it was given up.
        unreachable: whether nobody is there.
    """

    def __init__(self, why: str, status: int | None = None, unreachable: bool = False):
        super().__init__(why)
        self.status, self.unreachable = status, unreachable


class _TooMuch(Exception):
    """A server sends more, or for longer, than an answer can be."""


class Chat:
    """Asks a server, from several threads if need be; again, where it fails, after 1 s, 2 s, 4 s, … or when it says.

    Args:
        url: such as http://localhost:8000/v1.
        key: for the header Authorization; shown and stored nowhere.
        timeout: seconds without a byte of the answer; the whole of it may take ten times as long.
        retries: further tries after one that failed.

    Raises:
        ValueError: the address or the key is none.
        ImportError: httpx2 is missing.
    """

    def __init__(self, url: str, key: str | None, timeout: float, retries: int):
        import httpx2  # as huggingface_hub does; the extras keep and recipes have it

        url = url.strip()
        try:
            parts = httpx2.URL(url)
        except httpx2.InvalidURL:
            parts = httpx2.URL()
        is_one = parts.scheme in ("http", "https") and parts.host and 0 < (parts.port or 80) < 2**16
        if not is_one or parts.password or parts.query or parts.fragment:
            shown = f"…@{url.rpartition('@')[2]}" if "@" in url else url  # no password on a terminal
            raise ValueError(
                f"server {shown} is no address such as http://localhost:8000/v1, without a password or a query"
            )
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(
                "the key of the server has signs that no key has, such as an end of line: see api_key (--api-key-env)"
            )
        self.url = url.rstrip("/") + ("" if parts.path.rstrip("/") else "/v1") + "/chat/completions"
        self.retries, self.longest, self.stopped = retries, LONGEST * timeout, threading.Event()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # As many connections as threads ask.
        self.client = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits())
        self._failures = (httpx2.RequestError, _TooMuch)  # timeouts, broken connections, gzip that is none
        self._unreachable = httpx2.ConnectError

    def ask(self, body: dict, read: Callable[[dict], Any]) -> Any:
        """What `read` makes of the first choice of the answer, beside which stands the answer's `usage`. An answer on
        which it fails, as on a field that is missing, is no completion, and is asked for again.

        Raises:
            NoCompletion
        """
        for attempt in range(self.retries + 1):
            wait, unreachable = None, False
            try:
                response, content = self._post(body)
            except self._failures as error:
                trouble, unreachable = f"{type(error).__name__} ({error})", isinstance(error, self._unreachable)
            else:
                status = response.status_code
                trouble = f"status {status} ({_message(response, content)})"
                if response.is_success:
                    try:
                        answer = json.loads(content)
                        return read({**answer["choices"][0], "usage": answer.get("usage")})
                    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                        trouble = f"an answer that is no completion ({type(error).__name__}: {error})"
                elif status in PASSING or status >= 500:
                    wait = retry_after(response.headers.get("Retry-After", ""))
                else:
                    raise NoCompletion(trouble, status)
            if attempt < self.retries and self.stopped.wait(
                2**attempt * random.uniform(0.5, 1) if wait is None else wait
            ):
                raise NoCompletion("the run was stopped")
        times = f", {self.retries + 1} times" if self.retries else ""
        raise NoCompletion(f"{trouble}{times}", unreachable=unreachable)

    def _post(self, body: dict) -> tuple[Response, bytes]:
        """A response and what it holds, of which no more is read than an answer can be."""
        content, end = bytearray(), time.monotonic() + self.longest
        with self.client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise _TooMuch(f"more than {LARGEST >> 20} MB")
                if time.monotonic() > end:
                    raise _TooMuch(f"no end after {self.longest:.0f} s")
        return response, bytes(content)

    def stop(self) -> None:
        """Nothing is asked again: what waits for its next try ends now."""
        self.stopped.set()


def _message(response: Response, content: bytes) -> str:
    """What the server says about an error, shortened."""
    if response.status_code in MOVED:
        return f"it leads to {response.headers.get('Location')}"
    try:
        message = json.loads(content)
        message = message.get("error", message)
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError, RecursionError):
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:200]


def retry_after(header: str) -> float | None:
    """Seconds of the header Retry-After, which may be a date; None if it says nothing."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    if seconds != seconds:  # "nan"
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)
