"""Who is asked: a server that speaks OpenAI's protocol (vLLM, llama.cpp, a provider), or a model in this process."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from drift_peft.warn import first_line

PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    r"reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \boxed{}."
)
GREEDY = "the likeliest token each time, whatever generation_config.json says"
LARGEST = 32 * 2**20  # bytes of an answer
LONGEST = 10  # of a whole answer, in times of the longest silence
LONGEST_WAIT = 600.0  # seconds between two tries, whatever the server asks for
FATAL = {401: "refuses the key: see --api-key-env", 403: "refuses the key: see --api-key-env"}
FATAL[404] = "does not know this model or path: see --model and --server"


class Unanswered(Exception):
    """One question got no answer; others may."""


class TooMuch(Exception):
    """A server sends more, or for longer, than an answer can be."""


class TeacherError(RuntimeError):
    """No question will get an answer. One sentence."""


class Server:
    """Asks a server, again and again where it fails: after 1 s, 2 s, 4 s, …, or when the server says.

    Args:
        url: such as http://localhost:8000/v1.
        key: for the header Authorization; shown and stored nowhere.
        timeout: seconds without a byte of the answer; the whole of it may take ten times as long.
        retries: further tries after one that failed.
        concurrency: questions asked at the same time.
    """

    batch_size = 1

    def __init__(
        self, url: str, model: str, *, key: str | None, timeout: float, retries: int, concurrency: int,
        temperature: float, max_tokens: int,
    ):  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.password:
            raise TeacherError("--server takes an address such as http://localhost:8000/v1, without a password")
        self.url = url.rstrip("/") + ("" if parts.path.rstrip("/") else "/v1") + "/chat/completions"
        self.request = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.retries, self.concurrency, self.stopped = retries, concurrency, threading.Event()
        self.longest = LONGEST * timeout
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=concurrency)
        self.client = httpx2.Client(headers=headers, timeout=timeout, limits=limits)

    def __call__(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        """The answer to one conversation of messages and images: its `response` and `finish_reason`.

        Raises:
            Unanswered, TeacherError
        """
        (conversation,) = conversations
        body = {**self.request, "messages": _to_openai(*conversation)}
        for attempt in range(self.retries + 1):
            try:
                response, content = self._post(body)
            except (httpx2.RequestError, TooMuch) as error:  # timeouts, broken connections, gzip that is none
                trouble, wait = f"{type(error).__name__} ({error})", None
                unreachable = isinstance(error, httpx2.ConnectError)
            else:
                unreachable = False
                if response.status_code in FATAL:
                    raise TeacherError(f"the server {self.url} {FATAL[response.status_code]} ({_message(content)})")
                if response.is_success:
                    try:
                        return [_read_answer(content)]
                    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                        trouble, wait = f"an answer that is no completion ({type(error).__name__}: {error})", None
                elif response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
                    trouble, wait = f"status {response.status_code} ({_message(content)})", _retry_after(response)
                else:
                    raise Unanswered(f"status {response.status_code} ({_message(content)})")
            if attempt < self.retries and self.stopped.wait(
                2**attempt * random.uniform(0.5, 1) if wait is None else wait
            ):
                raise Unanswered("the run was stopped")
        if unreachable:
            raise TeacherError(f"the server {self.url} cannot be reached: {trouble}")
        raise Unanswered(f"{trouble}, {self.retries + 1} times")

    def _post(self, body: dict) -> tuple[httpx2.Response, bytes]:
        """A response and what it holds, of which no more is read than an answer can be."""
        content, end = bytearray(), time.monotonic() + self.longest
        with self.client.stream("POST", self.url, json=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    raise TooMuch(f"more than {LARGEST >> 20} MB")
                if time.monotonic() > end:
                    raise TooMuch(f"no end after {self.longest:.0f} s")
        return response, bytes(content)

    def stop(self) -> None:
        self.stopped.set()


class Local:
    """A vision-language model of transformers, in this process; on the GPU if there is one.

    Its weights are loaded where they are first used, so that its processor can be asked before.

    Args:
        temperature: 0 answers as GREEDY says; above it, the rest of how tokens are drawn is the model's own.
        processor: folder of another one than the model's, such as an adapter's with tokens of its own.
        processor_kwargs: settings of it that are not those of its folder, such as max_pixels.
    """

    concurrency = 1

    def __init__(
        self, model: str, *, batch_size: int, temperature: float, max_tokens: int, trust_remote_code: bool = False,
        processor: Path | None = None, processor_kwargs: dict | None = None,
    ):  # fmt: skip
        from transformers import AutoProcessor

        from drift_peft.checkpoints import split_revision
        from drift_peft.keeping import check_processor_settings

        self.batch_size, self.temperature, self.max_tokens = batch_size, temperature, max_tokens
        self.name = model
        self.source, revision = (model, None) if Path(model).exists() else split_revision(model)
        self.options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
        with _one_sentence(model):
            own = {**(processor_kwargs or {}), **self.options}
            self.processor = AutoProcessor.from_pretrained(processor or self.source, **own)
            check_processor_settings(self.processor, processor_kwargs or {})

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        from drift_peft.keeping import greedy_settings

        with _one_sentence(self.name):
            load = AutoModelForImageTextToText.from_pretrained
            loaded = load(self.source, dtype="auto", device_map="auto", **self.options)
        own = loaded.generation_config
        if self.temperature:
            own.update(max_new_tokens=self.max_tokens, do_sample=True, temperature=self.temperature)
        else:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            loaded.generation_config = greedy_settings(own, tokenizer, self.max_tokens)
        return loaded

    def __call__(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        """As that of Server, of a batch. TeacherError if it does not fit into memory."""
        self.model  # noqa: B018  is loaded before: that it does not fit is no fault of the batch
        with room_for(len(conversations)):
            return self._answer(conversations)

    def inputs(self, conversations: list[tuple[list[dict], list]]) -> Any:
        """What its processor makes of a batch."""
        from trl.data_utils import prepare_multimodal_messages

        from drift_peft.keeping import image_mode

        mode = image_mode(self.processor)
        return self.processor.apply_chat_template(
            [
                prepare_multimodal_messages(messages, images=[image.convert(mode) for image in images])
                for messages, images in conversations
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    def _answer(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        import torch

        inputs = self.inputs(conversations).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        end = self.model.generation_config.eos_token_id
        finished = torch.isin(tokens, torch.tensor([] if end is None else end).to(tokens)).any(1).tolist()
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        reasons = ["stop" if done else "length" for done in finished]
        return [{"response": text, "finish_reason": why} for text, why in zip(texts, reasons, strict=True)]

    def stop(self) -> None:
        """A batch is not interrupted."""


@contextlib.contextmanager
def _one_sentence(model: str) -> Iterator[None]:
    """TeacherError if a model cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise TeacherError(f"the model {model} cannot be loaded: {first_line(error)}") from error


def with_prompt(messages: list[dict], prompt: str) -> list[dict]:
    """Messages whose last one ends in a prompt, if there is one."""
    if not prompt:
        return messages
    *before, last = messages
    return [*before, {**last, "content": [*last["content"], {"type": "text", "text": f" {prompt}"}]}]


@contextlib.contextmanager
def room_for(batch_size: int) -> Iterator[None]:
    """TeacherError if a batch does not fit into memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TeacherError(f"a batch of {batch_size} does not fit into memory: take a smaller --batch-size") from error


def _to_openai(messages: list[dict], images: list) -> list[dict]:
    from drift_peft.keeping import data_address

    images = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": part["text"]}
                if part["type"] == "text"
                else {"type": "image_url", "image_url": {"url": data_address(next(images))}}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _read_answer(content: bytes) -> dict:
    """Of a choice, its text. Servers that split the thinking off have it in a field of its own."""
    choice = json.loads(content)["choices"][0]
    message = choice["message"]
    text = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(text, str) or not (text or thought):
        raise ValueError("it has no text")
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text.strip()}"
    return {"response": text, "finish_reason": choice.get("finish_reason")}


def _message(content: bytes) -> str:
    """What the server says about an error, shortened."""
    try:
        message = json.loads(content)
        message = message.get("error", message)
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError, RecursionError):
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:200]


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds of the header Retry-After, which may be a date."""
    header = response.headers.get("Retry-After", "")
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
