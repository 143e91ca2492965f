"""The VLM that answers in this process: known before its weights are loaded, then asked in batches."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..arguments import SLIP
from ..builds import explained
from ..checkpoints import Checkpoint
from ..warn import first_line, warn
from .answers import answer_logits, append_answers, image_mode, prompts, refuse_without_chat_template, to_model_device
from .file import NEEDS_PILLOW, vocabulary_rows
from .generation import ends_of, evaluated, greedy, load_model, refuse_infinite, with_room
from .sample_file import tokenizer_identity

if TYPE_CHECKING:
    from PIL.Image import Image

# Tokens that stand for an image's place, by the names that configs give them.
PLACES = re.compile(r"(image|video|vision|audio|boi|eoi|boa|eoa)_?.*token_(id|index)|media_placeholder_token_id")
OF_LOADING = "use_fast backend subfolder token cache_dir local_files_only force_download proxies code_revision".split()
PARTS = ("image_processor", "tokenizer", "video_processor", "feature_extractor")  # of a processor


class Vlm:
    """A VLM by its folder or hub id, or as it is in memory.

    Args:
        processor: if not the one that lies with it; or settings of that one, such as {"max_pixels": 262144}.

    Attributes:
        origin: its id and revision.
        config: of transformers.
        processor: what makes its inputs.
        identity: what tells it from others, as JSON holds it.

    Raises:
        FileNotFoundError, PermissionError, OSError: there is no such model.
        ValueError: it is no model, or has no processor with a chat template; it is a whole Omni model; or a model in
            memory came without a processor.
    """

    def __init__(self, model_or_id: nn.Module | str | Path, processor: Any = None, load_in_4bit: bool = False):
        self.load_in_4bit = load_in_4bit
        if isinstance(model_or_id, nn.Module):
            if load_in_4bit:
                raise ValueError("load_in_4bit goes with a model's id: this one is in memory already")
            if processor is None or isinstance(processor, dict):
                raise ValueError("give the processor of the model that is in memory: processor=")
            layers = [module for module in model_or_id.modules() if isinstance(module, BaseTunerLayer)]
            if any(not layer.disable_adapters for layer in layers):
                warn(
                    "The model answers with its adapter: unless that is meant, give the VLM before it is wrapped, or "
                    "by its folder or hub id."
                )
            self._checkpoint, self._given = None, model_or_id
            self.config = model_or_id.config
            name = getattr(self.config, "name_or_path", "")
            self.origin = {"id": name or type(model_or_id).__name__, "revision": None}
            self.identity = _fingerprint(model_or_id)
        else:
            self._checkpoint, self._given = Checkpoint(model_or_id, dequantize=True), None
            self.config, self.origin = self._checkpoint.config, self._checkpoint.origin
            self.identity = self._checkpoint.identity
        if hasattr(self.config, "thinker_config"):
            raise ValueError(
                f"{self.origin['id']} is a whole Omni model, which gives no logits: take its thinker, which is "
                "model.thinker with processor=, or the folder of model.thinker.save_pretrained and the processor"
            )
        if self.origin["revision"] is None and os.path.exists(self.origin["id"]):
            self.origin["id"] = os.path.abspath(self.origin["id"])  # elsewhere, models/vlm would look like a hub id
        settings = {} if processor is None else processor
        self.processor = self._load_processor(settings) if isinstance(settings, dict) else processor
        self._check_processor()

    @property
    def facts(self) -> dict:
        """What a keep set's header says of the VLM."""
        return {
            "vlm": self.origin,
            "model_type": self.config.model_type,
            "vocabulary": self.vocabulary,
            "tokenizer": tokenizer_identity(self.processor),
            "processor": type(self.processor).__name__,
            "image_mode": self.image_mode,
        }

    @property
    def vocabulary(self) -> int:
        """How many tokens it gives a probability."""
        return vocabulary_rows(self.config)

    @property
    def image_mode(self) -> str:
        return image_mode(self.processor)

    @property
    def places(self) -> list[int]:
        """Tokens that stand for an image's place in the input, which no answer can hold."""
        values = {value for key, value in self.config.to_dict().items() if PLACES.fullmatch(key)}
        return sorted(value for value in values if isinstance(value, int))

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end its answers, the one first that its chat template writes behind an answer."""
        from transformers import GenerationConfig

        tokenizer = self.processor.tokenizer
        if self._given is not None:
            own = self._given.generation_config
        else:
            try:
                own = GenerationConfig.from_pretrained(self.origin["id"], revision=self.origin["revision"])
            except OSError:  # it lies there without one: transformers then reads config.json
                own = GenerationConfig.from_model_config(self.config)
        ends = ends_of(own, tokenizer)
        chat = [{"role": role, "content": [{"type": "text", "text": "?!"}]} for role in ("user", "assistant")]
        try:
            _, _, behind = self.processor.apply_chat_template(chat).rpartition("?!")
        except Exception:  # whatever a template raises that takes no answers, or these in another form
            behind = ""
        written = [*tokenizer.encode(behind, add_special_tokens=False), tokenizer.eos_token_id]
        return list(dict.fromkeys([*(token for token in written if token in ends), *ends]))

    def asked(self, question: str) -> str:
        """A question in text as its chat template writes it, up to where the answer begins."""
        turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        return self.processor.apply_chat_template([turn], add_generation_prompt=True)

    def check_top_k(self, k: int) -> None:
        """ValueError if it has fewer tokens than these."""
        if k > self.vocabulary:
            raise ValueError(
                f"top_k={k} (--top-k) is larger than the vocabulary of {self.origin['id']}, which has "
                f"{self.vocabulary} tokens: lower it"
            )

    def check_written(self, what: str, texts: Iterable[str], source: str, why: str) -> None:
        """ValueError if a text, such as a question, holds a token that stands for an image's place: none comes there.

        Args:
            source: where the texts come from.
            why: what tells that no image comes there, as the error's last words.
        """
        written = getattr(self.processor, "image_token", None)  # which need not be a token: some processors replace it
        for text in texts:
            places = {*self.places} & {*self.processor.tokenizer(text)["input_ids"]}
            if places or (written and str(written) in text):
                token = self.processor.tokenizer.convert_ids_to_tokens(min(places)) if places else written
                raise ValueError(
                    f"{source} holds the {what} {text!r}, in which {token} stands for an image: take it out, "
                    f"since {why}"
                )

    @property
    def skeleton(self) -> nn.Module:
        """The model without its weights, as far as they are not there already."""
        return self._checkpoint.model if self._given is None else self._given

    @cached_property
    def model(self) -> nn.Module:
        """With its weights, on the GPU if there is one."""
        if self._given is not None:
            return self._given
        return load_model(self._checkpoint, self.load_in_4bit)

    @torch.no_grad()
    def answer(
        self, images: Sequence[Image], questions: Sequence[str], max_new_tokens: int, k: int
    ) -> list[dict[str, Tensor]]:
        """The greedy answer to each question about its image: `tokens` [T], `top_tokens` and `top_logprobs` [T, k].

        Generated in one batch, and scored by one pass over questions and answers, as training sees them.

        Raises:
            ValueError: there is no room for the batch on the GPU, or the model gives NaN.
        """
        scored = []
        in_4bit_helps = self._given is None and not self.load_in_4bit
        with with_room(f"{len(images)} questions", in_4bit_helps), evaluated(self.model):
            inputs = to_model_device(prompts(self.processor, images, questions), self.model)
            answers = greedy(self.model, self.processor.tokenizer, inputs, max_new_tokens, self.places)
            whole, answer_mask = append_answers(inputs, answers, self.processor.tokenizer.pad_token_id)
            logits = answer_logits(self.model, whole, answer_mask.shape[1])
            for tokens, row, places in zip(answers, logits, answer_mask, strict=True):
                top = torch.log_softmax(row[places.to(row.device)].float(), -1).topk(k)
                refuse_infinite(top.values, self.origin["id"])
                scored.append({"tokens": tokens, "top_tokens": top.indices, "top_logprobs": top.values})
        return [{name: tensor.cpu() for name, tensor in answer.items()} for answer in scored]

    def _load_processor(self, settings: dict[str, Any]) -> Any:
        from transformers import AutoProcessor

        id, revision = self.origin["id"], self.origin["revision"]
        try:
            processor = AutoProcessor.from_pretrained(id, revision=revision, trust_remote_code=False, **settings)
        except Exception as error:  # each class has its own way to say that its files are not there
            if importlib.util.find_spec("PIL") is None:
                raise ImportError(NEEDS_PILLOW) from error
            if (explanation := explained(error)) is not error:
                raise explanation from error
            reason = first_line(error)
            raise ValueError(f"{id} has no processor that transformers can load ({reason})") from error
        check_processor_settings(processor, settings)
        return processor

    def _check_processor(self) -> None:
        kind = type(self.processor).__name__
        if getattr(self.processor, "image_processor", None) is None or not hasattr(self.processor, "tokenizer"):
            raise ValueError(f"{self.origin['id']} has no processor of images but {kind}: give a VLM")
        refuse_without_chat_template(self.processor, self.origin["id"])
        if self.processor.tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {self.origin['id']} has no padding token: set its pad_token")


def check_processor_settings(processor: Any, settings: Iterable[str]) -> None:
    """ValueError for a misspelt setting of a processor, which transformers passes over in silence.

    Warns:
        UserWarning: a setting that no part of the processor is known to take.
    """
    taken, attributes = set(), set()
    for part in [processor, *(getattr(processor, name, None) for name in PARTS)]:
        taken |= {*getattr(getattr(part, "valid_kwargs", None), "__annotations__", ())}
        taken |= {*inspect.signature(type(part).__init__).parameters} - {"self", "args", "kwargs"}
        attributes |= {name.lstrip("_") for name in (*getattr(part, "__dict__", ()), *dir(type(part)))}
    for key in {*settings} - taken - attributes - {*OF_LOADING}:
        message = f"{type(processor).__name__} has no setting {key}"
        if near := get_close_matches(key, taken, 1, SLIP):
            raise ValueError(f"{message}: did you mean {near[0]}?")
        warn(f"{message} that is known here: it may be without effect.")


def _fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and first numbers of a model's weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:8].tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {first}".encode())
    return digest.hexdigest()
