"""The models that reproduce_drift.sh has VLMEvalKit ask, in a file of its form; beside their answers, which gave them.

VLMEvalKit's --reuse takes what it finds of a name, whichever model and settings have answered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from drift_peft.atomic import write_json

from .command_line import in_one_sentence
from .stamp import stamp

FILE = "model.json"  # in the folder of a model's answers


def write_asked(settings: Path, file: Path, models: dict[str, str]) -> None:
    """Write VLMEvalKit's configuration, and mark the folders of answers.

    Args:
        settings: VLMEvalKit's configuration of three other models, all asked alike.
        file: to write, beside the folders of the adapters.
        models: name -> what is asked: the base, and what was merged of the adapter in the folder of that name.

    Raises:
        ValueError: there are answers of another model, or to other settings.
    """
    content, answers = json.loads(settings.read_text(encoding="utf-8")), file.with_name("answers")
    alike = content["model"]["base"]
    if answers.exists() and file.exists():
        try:
            before = {**json.loads(file.read_text(encoding="utf-8"))["model"]["base"], "model_path": ""}
        except (ValueError, KeyError, TypeError) as error:
            way_out = f"delete it if the answers in {answers} are to the settings of {settings}, or move both away"
            raise ValueError(f"{file} is damaged ({error}): {way_out}") from error
        if before != alike | {"model_path": ""}:
            message = f"{answers} holds answers to the settings of {file}, and {settings} has others"
            raise ValueError(f"{message}: move both away")
    marks = {}
    for name, path in models.items():
        model = path if name == "base" else str(file.with_name(name))  # since what is merged again is the same
        marks[answers / name / FILE] = {"mark": stamp(model) or path}  # a hub id stands for itself
        refuse_others(answers / name, model, marks[answers / name / FILE])
    for mark, of in marks.items():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, of)
    content["model"] = {name: alike | {"model_path": path} for name, path in models.items()}
    write_json(file, content)


def refuse_others(answers: Path, model: str, now: dict) -> None:
    """ValueError if a folder holds answers of another model than there is now."""
    if not any(path.is_file() for path in answers.glob("*/*")):
        return
    if not (answers / FILE).exists():
        print(
            f"note: {answers} does not say which model has answered, and is taken for that of {model}", file=sys.stderr
        )
    elif json.loads((answers / FILE).read_text(encoding="utf-8")) != now:
        raise ValueError(f"{answers} holds answers of another model than {model} is now: move them away")


def main(settings: str, file: str, *models: str) -> None:
    with in_one_sentence("reproduce_drift.sh", ValueError, OSError):
        write_asked(Path(settings), Path(file), dict(named.split("=", 1) for named in models))


if __name__ == "__main__":
    main(*sys.argv[1:])
