"""Who is asked: a server that speaks OpenAI's protocol (vLLM, llama.cpp, a provider), or a model in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drift_peft.chat import MOVED, Chat, NoCompletion
from drift_peft.warn import first_line

PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    r"reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \boxed{}."
)
FATAL = dict.fromkeys((401, 403), "give the server's key (--api-key-env)")  # status -> way out
FATAL[404] = "give the address that ends in /v1 (--server), and the id by which it knows its model (--model)"
FATAL |= dict.fromkeys(MOVED, "give that address, up to its /v1 (--server)")


class Unanswered(Exception):
    """One question got no answer; others may."""


class TeacherError(RuntimeError):
    """No question will get an answer. One sentence."""


class Server:
    """Asks a server, as `Chat` does.

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
        try:
            self.chat = Chat(url, key, timeout, retries)
        except ValueError as error:
            raise TeacherError(str(error)) from error
        self.request = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self.concurrency = concurrency

    def __call__(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        """The answer to one conversation of messages and images: its `response` and `finish_reason`.

        Raises:
            Unanswered, TeacherError
        """
        (conversation,) = conversations
        try:
            return [self.chat.ask({**self.request, "messages": _to_openai(*conversation)}, _read_answer)]
        except NoCompletion as error:
            if error.unreachable:
                raise TeacherError(f"the server {self.chat.url} cannot be reached: {error}") from error
            if error.status in FATAL:
                told = f"the server {self.chat.url} refuses the question: {error}; {FATAL[error.status]}"
                raise TeacherError(told) from error
            raise Unanswered(str(error)) from error

    def stop(self) -> None:
        self.chat.stop()


class Local:
    """A vision-language model of transformers, in this process; on the GPU if there is one.

    Before `load` it has no more than its processor, which can be asked what it takes.

    Args:
        temperature: 0 takes the likeliest token each time, whatever the model's generation_config.json says; above it,
            the rest of how tokens are drawn is the model's own.
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

    def load(self) -> None:
        """Load the weights. TeacherError if they cannot be loaded."""
        from transformers import AutoModelForImageTextToText

        from drift_peft.keeping import greedy_settings

        with _one_sentence(self.name):
            load = AutoModelForImageTextToText.from_pretrained
            self.model = load(self.source, dtype="auto", device_map="auto", **self.options)
        own = self.model.generation_config
        if self.temperature:
            own.update(max_new_tokens=self.max_tokens, do_sample=True, temperature=self.temperature)
        else:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            self.model.generation_config = greedy_settings(own, tokenizer, self.max_tokens)

    def __call__(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        """As that of Server, of a batch. TeacherError if it does not fit into memory."""
        with room_for(len(conversations)):
            return self._answer(conversations)

    def inputs(self, conversations: list[tuple[list[dict], list]]) -> Any:
        """What its processor makes of a batch."""
        return self.processor.apply_chat_template(
            self._turns(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    def _turns(self, conversations: list[tuple[list[dict], list]]) -> list[list[dict]]:
        """A batch as chat templates take it."""
        from trl.data_utils import prepare_multimodal_messages

        from drift_peft.keeping import image_mode

        mode = image_mode(self.processor)
        return [
            prepare_multimodal_messages(messages, images=[image.convert(mode) for image in images])
            for messages, images in conversations
        ]

    def _answer(self, conversations: list[tuple[list[dict], list]]) -> list[dict]:
        import torch

        from drift_peft.keeping import think_prefix

        inputs = self.inputs(conversations).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        end = self.model.generation_config.eos_token_id
        finished = torch.isin(tokens, torch.tensor([] if end is None else end).to(tokens)).any(1).tolist()
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        reasons = ["stop" if done else "length" for done in finished]
        asked = self.processor.apply_chat_template(self._turns(conversations), add_generation_prompt=True)
        opened = [_with_opening(think_prefix(prompt), text) for prompt, text in zip(asked, texts, strict=True)]
        return [{"response": text, "finish_reason": why} for text, why in zip(opened, reasons, strict=True)]

    def stop(self) -> None:
        """A batch is not interrupted."""


def _with_opening(opening: str, response: str) -> str:
    """A response behind the think tag that its prompt ends in: without it, thinking that never ends is no thinking."""
    return response if response.lstrip().startswith(opening.strip()) else opening + response


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


def _read_answer(choice: dict) -> dict:
    """Of a choice, its text. Servers that split the thinking off have it in a field of its own."""
    message = choice["message"]
    text = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(text, str) or not (text or thought):
        raise ValueError("it has no text")
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text.strip()}"
    return {"response": text, "finish_reason": choice.get("finish_reason")}
