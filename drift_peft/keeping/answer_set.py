"""The file of an expert's own answers to prompts in text, as `sample_file` describes it.

The tokens are those of the VLM. The header also holds expert (its id and revision), identity (hash of its files),
generation (its settings) and the prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from .header import AnswersHeader
from .sample_file import SampleFile

FILE_NAME = "answers.safetensors"


class AnswerSet(SampleFile):
    """An expert's own answers to prompts in text, in the tokens of a VLM; `answer_set[i]` is read on access.

    Make one with `load` or `make_answer_set`.
    """

    NOUN, MAKE = "answer set", "name another file, or delete it"
    HEADER_KEY, HEADER = "drift_answers", AnswersHeader

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open an answer set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no answer set, or a damaged one.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no answer set {path}")
        return cls(Path(path), str(path))

    def check(self, processor: Any) -> None:
        """ValueError unless this processor's tokenizer has the tokens of the answers."""
        if not self.has_tokens_of(processor):
            raise ValueError(
                f"{self.source} holds answers in another tokenizer's tokens than this {type(processor).__name__}'s: "
                "make it again"
            )

    def _asked(self, i: int) -> tuple[str, str]:
        return "text", self.metadata["prompts"][i]

    def _image(self, i: int) -> None:
        return None

    def _is_whole(self) -> bool:
        return super()._is_whole() and self._holds({}) and len(self.metadata["prompts"]) == len(self)
