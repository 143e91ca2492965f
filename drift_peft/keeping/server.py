"""The VLM that answers behind a server of OpenAI's protocol, such as vLLM: words and log probabilities back to tokens.

A server names tokens by their text, which may stand for several of them. vLLM names them by number when it is asked to,
as does llama.cpp; from other servers a token is taken if its text or bytes are those of one token alone.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..chat import MOVED, Chat, NoCompletion
from ..warn import warn
from .file import data_address

if TYPE_CHECKING:
    from PIL.Image import Image

RETRIES = 4
TIMEOUT = 600.0  # seconds without a byte of an answer, which most servers send when it is whole
NUMBER = re.compile(r"token_id:(\d+)")
LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's
TOO_MANY = "vLLM allows top_k={k} (--top-k) when it is started with --max-logprobs {k}"
WAYS_OUT = dict.fromkeys((401, 403), "give the server's key as api_key (--api-key-env)")
WAYS_OUT[404] = "give the address that ends in /v1, and the id by which the server knows its model, if not {model}"
WAYS_OUT[413] = "have it take larger requests (client_max_body_size of nginx), or take smaller pictures"
WAYS_OUT |= dict.fromkeys(MOVED, "give that address, up to its /v1, as server (--server)")
TORN = "\ufffd"  # what a server writes for bytes that are no text on their own


class Server:
    """Asks a server, several questions at a time.

    Args:
        url: such as http://localhost:8000/v1.
        model: what the server calls the VLM.
        tokenizer: of the VLM.
        vocabulary: how many tokens the VLM has.
        places: tokens that no answer can hold.
        api_key: for the header Authorization; stored nowhere.
        ends: tokens of which each ends an answer.
        counts: how many tokens the VLM's processor makes of an image and a question.

    Raises:
        ValueError: the address or the key is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        vocabulary: int,
        places: Sequence[int],
        api_key: str | None = None,
        ends: Sequence[int] = (),
        counts: Callable[[Image, str], int] | None = None,
    ):
        self._ends, self._counts = {*ends}, counts
        self._chat = Chat(url, api_key, TIMEOUT, RETRIES)
        self.url = self._chat.url
        self.model, self.tokenizer, self.vocabulary, self.places = model, tokenizer, vocabulary, {*places}

    def answer(
        self, images: Sequence[Image], questions: Sequence[str], max_new_tokens: int, k: int
    ) -> list[dict[str, Tensor]]:
        """As `Vlm.answer`.

        Warns:
            UserWarning: once, the server makes another number of tokens of an image and its question than the
                processor; once, it leaves out the token that ends an answer.

        Raises:
            ConnectionError: the server cannot be reached, or fails again and again.
            ValueError: it refuses the question, gives no log probabilities or too few, names what is no token, or cuts
                an answer before max_new_tokens.
        """
        with ThreadPoolExecutor(len(images)) as pool:
            asked = pool.map(lambda image, question: self._ask(image, question, max_new_tokens, k), images, questions)
            try:
                choices = [*asked]
            except BaseException:  # the run ends, and the other questions need not wait for their next try
                self._chat.stop()
                raise
        answers = [self._read(choice, k) for choice in choices]
        for image, question, choice, answer in zip(images, questions, choices, answers, strict=True):
            self._check_prompt(image, question, choice["usage"])
            self._check_end(choice.get("finish_reason"), answer["tokens"], max_new_tokens)
        return answers

    def _check_prompt(self, image: Image, question: str, usage: Any) -> None:
        """The server makes its inputs as it was started, whatever the processor here is told."""
        seen = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if self._counts is None or not isinstance(seen, int):
            return
        if (made := self._counts(image, question)) != seen:
            self._counts = None
            warn(
                f"the server {self.url} makes {seen} tokens of an image and its question, and the processor here makes "
                f"{made}: it answers at another resolution of images, or with another chat template, than keeping will "
                "ask. Start it with the same settings, as vLLM takes them by --mm-processor-kwargs and --chat-template."
            )

    def _check_end(self, reason: str | None, tokens: Tensor, max_new_tokens: int) -> None:
        if reason == "length" and len(tokens) < max_new_tokens:
            raise ValueError(
                f"the server {self.url} cuts an answer after {len(tokens)} tokens, before max_new_tokens="
                f"{max_new_tokens}: raise its own limit, or pass max_new_tokens={len(tokens)} (--max-new-tokens)"
            )
        if reason == "stop" and self._ends and int(tokens[-1]) not in self._ends:
            self._ends = set()
            warn(
                f"the server {self.url} leaves out the token that ends an answer, so that keeping cannot hold the "
                "model to it: take a server that names it, such as vLLM."
            )

    def _ask(self, image: Image, question: str, max_new_tokens: int, k: int) -> dict:
        parts = [{"type": "image_url", "image_url": {"url": data_address(image)}}, {"type": "text", "text": question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
            "logprobs": True,
            "top_logprobs": k,
            "repetition_penalty": 1.0,  # else vLLM takes that of the model's generation_config.json
            "return_tokens_as_token_ids": True,
        }
        return self._post(body, k)

    def _post(self, body: dict, k: int) -> dict:
        """The first choice of the answer."""
        try:
            return self._chat.ask(body, dict)
        except NoCompletion as error:
            if error.status is None:
                raise ConnectionError(f"the server {self.url} does not answer: {error}") from error
            way_out = WAYS_OUT.get(error.status, TOO_MANY if "logprobs" in str(error) else "its log may say more")
            way_out = way_out.format(model=self.model, k=k)
            raise ValueError(f"the server {self.url} refuses the question: {error}; {way_out}") from error

    def _read(self, choice: dict, k: int) -> dict[str, Tensor]:
        entries = (choice.get("logprobs") or {}).get("content")
        if not entries or not all(entry.get("top_logprobs") for entry in entries):
            raise ValueError(f"the server {self.url} gives no log probabilities: take one that does, such as vLLM")
        tokens, top_tokens, top_logprobs = [], [], []
        for entry in entries:
            tokens.append(self._token(entry))
            logprobs = {self._token(other): float(other["logprob"]) for other in entry["top_logprobs"]}
            best = sorted(logprobs.items(), key=lambda item: (-item[1], item[0]))[:k]
            if len(best) < k:
                raise ValueError(
                    f"the server {self.url} gives {len(best)} log probabilities of a token, not {k}: pass "
                    f"top_k={len(best)} (--top-k)"
                )
            if not all(math.isfinite(logprob) for _, logprob in best):
                raise ValueError(f"the server {self.url} gives a log probability that is NaN or infinite: take another")
            top_tokens.append([token for token, _ in best])
            top_logprobs.append([logprob for _, logprob in best])
        if places := self.places & {*tokens}:
            raise ValueError(f"the server {self.url} answers with token {min(places)}, which stands for an image")
        return {
            "tokens": torch.tensor(tokens),
            "top_tokens": torch.tensor(top_tokens),
            "top_logprobs": torch.tensor(top_logprobs, dtype=torch.float32),
        }

    def _token(self, entry: dict) -> int:
        """The number of a token. ValueError if it is not that of one token alone."""
        text = entry["token"]
        number = NUMBER.fullmatch(text)
        numbers = {int(number[1])} if number else {entry["id"]} if isinstance(entry.get("id"), int) else None
        if numbers is None:
            spelled = bytes(entry["bytes"]) if entry.get("bytes") else text.encode()
            torn = TORN in text and spelled == text.encode()
            numbers = set() if torn else self._by_text[text] | self._by_text[spelled]
        if len(numbers) != 1 or not 0 <= min(numbers) < self.vocabulary:
            raise ValueError(
                f"the server {self.url} says {text!r}, which is not one token of {self.model}'s tokenizer but "
                f"{len(numbers) or 'none'}: take a server that numbers its tokens, such as vLLM"
            )
        return min(numbers)

    @cached_property
    def _by_text(self) -> dict[str | bytes, set[int]]:
        """How a server may write a token -> those that are written so: as text, or as the bytes that it stands for."""
        numbers: dict[str | bytes, set[int]] = defaultdict(set)
        vocabulary = self.tokenizer.get_vocab()
        byte_level = any(token.startswith("Ġ") for token in vocabulary)
        for token, number in vocabulary.items():
            text = self.tokenizer.decode([number])
            texts = () if TORN in text else (text, text.encode())
            # A letter of a byte-level token is a byte, so that é is not what it says.
            forms = (_bytes_of(token),) if byte_level else (token, _spelled(token))
            for form in {*forms, *texts} - {"", b""}:
                numbers[form].add(number)
        return numbers


def _bytes_of(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one that was added stands for itself."""
    return bytes(map(LETTERS.get, token)) if {*token} <= LETTERS.keys() else token.encode()


def _spelled(token: str) -> bytes:
    """What a token of SentencePiece stands for."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
