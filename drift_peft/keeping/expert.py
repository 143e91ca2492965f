"""A text-only expert and prompts -> its own answers in the tokens of a VLM, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints import Checkpoint, claimed_output, resumable_folder
from ..warn import first_line
from .answer_set import FILE_NAME, AnswerSet
from .answers import answer_logits, append_answers, refuse_without_chat_template, think_prefix
from .generation import ends_of, evaluated, greedy, load_model, machine, refuse_infinite, with_room
from .make import answers_in_batches
from .questions import read_lines
from .sample_file import tokenizer_identity, write_sample_file
from .spelling import Spelling
from .vlm import Vlm


class Expert:
    """A text-only model by its folder or hub id; or a natively multimodal one, which is asked in text alone.

    Attributes:
        origin: its id and revision.
        tokenizer: with a chat template.

    Raises:
        FileNotFoundError, PermissionError, OSError: there is no such model.
        ValueError: it is no model, or its tokenizer has no chat template.
    """

    def __init__(self, source: str | Path, load_in_4bit: bool = False):
        from transformers import AutoTokenizer

        source = os.path.abspath(source) if os.path.exists(source) else source  # the same by any path
        self.load_in_4bit, self._checkpoint = load_in_4bit, Checkpoint(source, dequantize=True)
        self.origin, self.identity = self._checkpoint.origin, self._checkpoint.identity
        id, revision = self.origin["id"], self.origin["revision"]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, trust_remote_code=False)
        except Exception as error:  # each class has its own way to say that its files are not there
            reason = first_line(error)
            raise ValueError(f"{id} has no tokenizer that transformers can load ({reason})") from error
        refuse_without_chat_template(self.tokenizer, id)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "left"

    @cached_property
    def model(self) -> nn.Module:
        """With its weights, on the GPU if there is one."""
        return load_model(self._checkpoint, self.load_in_4bit)

    def asked(self, prompt: str) -> str:
        """A prompt as a user's turn of its chat template, up to where the answer begins.

        Raises:
            ValueError: the template leaves the prompt out.
        """
        for content in (prompt, [{"type": "text", "text": prompt}]):  # templates of multimodal models want a list
            turn = [{"role": "user", "content": content}]
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            if prompt.strip() in text:
                return text
        raise ValueError(f"the chat template of {self.origin['id']} leaves out a prompt: {prompt[:60]!r}")

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[str], max_new_tokens: int, spelling: Spelling, k: int, opened: bool = False
    ) -> list[dict[str, Tensor]]:
        """The greedy answer to each prompt, as `Spelling.answer` has it. `opened`: the VLM's own template opens the
        thinking, so that the answer does not.

        Raises:
            ValueError: there is no room for the batch on the GPU, or the model gives NaN.
        """
        texts = [self.asked(prompt) for prompt in prompts]
        openings = ["" if opened else think_prefix(text) for text in texts]
        with with_room(f"{len(prompts)} prompts", not self.load_in_4bit), evaluated(self.model):
            # The template has written the special tokens.
            inputs = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
            inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            answers = greedy(self.model, self.tokenizer, inputs, max_new_tokens)
            whole, answer_mask = append_answers(inputs, answers, self.tokenizer.pad_token_id)
            logits = answer_logits(self.model, whole, answer_mask.shape[1])
            refuse_infinite(logits[answer_mask.to(logits.device)], self.origin["id"])
            return [
                spelling.answer(tokens.tolist(), row[places.to(row.device)], k, first)
                for tokens, row, places, first in zip(answers, logits, answer_mask, openings, strict=True)
            ]


def make_answer_set(
    expert: str | Path,
    vlm: Vlm,
    texts: str | Path | Sequence[str],
    output: str | Path,
    max_new_tokens: int = 512,
    top_k: int = 32,
    load_in_4bit: bool = False,
    batch_size: int = 8,
    progress: bool = True,
    afresh: bool = False,
) -> AnswerSet:
    """Have an expert answer prompts in text, and write what it says in the tokens of a VLM; or take the output of such
    a call with the same expert, prompts and settings.

    Each answer takes the likeliest token each time, and keeps the `top_k` largest probabilities of each of its tokens.
    An interrupted run goes on as one of `make_keep_set` does.

    Args:
        expert: text-only model: folder, hub id or `id@revision`.
        vlm: in whose tokens; its weights are not loaded for this.
        texts: prompts, or a file of them (`read_texts`).
        output: file to write.
        max_new_tokens: an answer is cut there.
        top_k: how many log probabilities of each answer token.
        load_in_4bit: load the expert's projections in NF4, and the rest as it is.
        batch_size: prompts at a time.
        progress: show a progress bar on stderr.
        afresh: throw away what an interrupted run of other settings has left, instead of refusing.

    Raises:
        ValueError: there are no prompts, or one holds an image's token; the expert has no chat template; the two
            models' tokens have too little in common; the GPU has no room.
        OSError: the expert or the file of prompts is not found; the output was made in another way, or cannot be
            written.
    """
    prompts, output = read_texts(texts), Path(output)
    model = Expert(expert, load_in_4bit)
    vlm.check_top_k(top_k)
    source = str(texts) if isinstance(texts, (str, Path)) else "texts"
    vlm.check_written("prompt", prompts, source, "the expert is asked in text alone")
    facts = {
        "format": AnswerSet.FORMAT,
        "expert": model.origin,
        "identity": hashlib.sha256(json.dumps(model.identity, sort_keys=True).encode()).hexdigest(),
        "tokenizer": tokenizer_identity(vlm.processor),
        "k": top_k,
        "generation": {"max_new_tokens": max_new_tokens, "load_in_4bit": load_in_4bit},
        "prompts": prompts,
    }
    if output.is_file():
        return _if_alike(AnswerSet.load(output), facts)
    everything = {key: value for key, value in facts.items() if key != "expert"}  # whose place may be another now
    everything |= {"batch_size": batch_size, **machine()}
    claimed = claimed_output(output, overwrite=False, example=FILE_NAME)
    with claimed, resumable_folder(output, everything, afresh, parts="batches") as folder:
        ends = ends_of(model.model.generation_config, model.tokenizer)
        spelling = Spelling(model.tokenizer, vlm.processor.tokenizer, ends, vlm.ends, vlm.vocabulary)
        opened = bool(think_prefix(vlm.asked("?")))

        def ask(start: int) -> list[dict[str, Tensor]]:
            return model.answer(prompts[start : start + batch_size], max_new_tokens, spelling, top_k, opened)

        answers = answers_in_batches(folder, len(prompts), batch_size, ask, "expert's answers", progress)
        decode = vlm.processor.tokenizer.decode
        facts["answers"] = [decode(answer["tokens"], skip_special_tokens=True) for answer in answers]
        write_sample_file(AnswerSet, folder, output, answers, facts)
    return AnswerSet.load(output)


def read_texts(texts: str | Path | Sequence[str]) -> list[str]:
    """Prompts as they are given, or of a file: one a line; in a .jsonl file as strings of JSON, which may have several
    lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no prompt, or a line is none; the file is no UTF-8 text.
    """
    if isinstance(texts, (str, Path)):
        path = Path(texts)
        lines = [(number, line) for number, line in enumerate(read_lines(path, "prompts"), 1) if line.strip()]
        texts = [_string(line, number, path) if path.suffix == ".jsonl" else line for number, line in lines]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a prompt must be a text that is not empty, got {text!r}")
    if not texts:
        raise ValueError("there are no prompts for the expert to answer: give at least one")
    return [*texts]


def _string(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {path} is no JSON, {line[:40]!r}: write a string a line") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"line {number} of {path} is no prompt, {line[:40]!r}: write a string that is not empty")
    return text


def _if_alike(existing: AnswerSet, facts: dict) -> AnswerSet:
    """The file, if it was made in this way. Which expert it is, `identity` says, wherever that lies today."""
    for key, expected in facts.items():
        if key != "expert" and existing.metadata[key] != expected:
            what = "expert" if key == "identity" else key
            raise FileExistsError(
                f"{existing.source} exists and was made with another {what}: name another file for the answers "
                "(--answers), or delete this one"
            )
    return existing
