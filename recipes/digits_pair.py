"""Write the demo's world as a user has a pair of their own: samples, pictures, questions and recipes, for compare.py.

    python recipes/digits_pair.py digits

In the folder: `train.jsonl`, 200 pictures of two and three operations with their chains of thought; `text.jsonl`, as
many chains about text alone; `prompts.txt`, their questions, which the expert is asked; `test.jsonl`, exams by
category; `recipe.yaml` and `text.yaml`, which train on pictures and on text; `unlabelled/`, 240 pictures for a keep
set, and `questions.txt`, which it asks about them. The recipes' paths begin where this command was run.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("digits_pair.py", extra="demo")

import json
from pathlib import Path

import numpy as np
import yaml
from parts.command_line import Parser, in_one_sentence, run_script

from drift_peft.demo.compare import CHECKPOINTS, QUESTIONS, unlabelled
from drift_peft.demo.evaluate import exams
from drift_peft.demo.world import PERCEPTION, Digits, Sample, make_samples

TRAINING = {  # as drift_peft.demo.train, with the rate of drift_peft/demo/tuning.json for LoRA and for DRIFT
    "prior_rank": 64, "r": 8, "lora_alpha": 16, "learning_rate": 0.005, "lr_scheduler_type": "cosine", "max_steps": 150,
    "per_device_train_batch_size": 16, "optim": "adamw_torch", "max_tokens": 256, "use_cpu": True, "bf16": False,
    "keep_samples": 240, "keep_top_k": 8, "keep_batch_size": 8,
    "logging_steps": 50, "save_steps": 50, "save_total_limit": 1, "report_to": "none",
}  # fmt: skip


def write_samples(samples: dict[str, list[Sample]], folder: Path, name: str) -> None:
    """Category -> samples, as `<name>.jsonl` with the pictures that it names."""
    lines = []
    for category, group in samples.items():
        for sample in group:
            line = {"question": f"{sample.symbols}{sample.question}", "answer": sample.answer, "category": category}
            if sample.image is not None:
                line |= {"question": f"<image>{sample.question}", "image": f"pictures/{name}{len(lines)}.png"}
                sample.image.save(folder / line["image"])
            lines.append(json.dumps(line))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_world(folder: Path, size: int, seed: int) -> None:
    """All files, with `size` samples an exam."""
    for name in ("pictures", "unlabelled"):
        (folder / name).mkdir(parents=True)
    rng, digits = np.random.default_rng([seed, 1]), Digits("train")
    write_samples({"solve": make_samples(200, ["solve"], rng, digits, operations=(2, 3))}, folder, "train")
    solved = make_samples(200, ["solve"], rng)
    write_samples({"solve": solved}, folder, "text")
    asked = "".join(f"{sample.symbols}{sample.question}\n" for sample in solved)
    (folder / "prompts.txt").write_text(asked, encoding="utf-8")
    for i, image in enumerate(unlabelled(digits, seed)):
        image.save(folder / "unlabelled" / f"{i:03d}.png")
    tests = exams("test", seed, size)
    for task in PERCEPTION:  # a sign alone is no answer to evaluate.py, which looks for numbers and words
        marked = [sample for sample in tests.pop(task) if any(map(str.isdigit, sample.answer))]
        tests.setdefault("perception", []).extend(marked[: size // len(PERCEPTION)])
    write_samples(tests, folder, "test")
    (folder / "questions.txt").write_text("".join(f"{kind}\t{question}\n" for kind, question in QUESTIONS), "utf-8")

    models = {"base": "vlm", "expert": "reasoner", "reference": "base"}
    paths = {"prior": "prior.safetensors", "keep": "keep.safetensors", "keep_images": "unlabelled"}
    paths |= {"keep_questions": "questions.txt"}
    settings = {role: str(CHECKPOINTS / name) for role, name in models.items()}
    settings |= {key: str(folder / name) for key, name in paths.items()} | TRAINING
    for recipe, data in (("recipe", "train"), ("text", "text")):
        own = {"data": str(folder / f"{data}.jsonl"), "output_dir": str(folder / f"run_{data}")}
        (folder / f"{recipe}.yaml").write_text(yaml.safe_dump(settings | own, sort_keys=False), "utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("digits_pair.py", __doc__)
    parser.add_argument("folder", type=Path, help="to write; it must not exist")
    parser.add_argument("--size", type=int, default=100, help="samples an exam")
    parser.add_argument("--seed", type=int, default=0, help="of all samples")
    args = parser.parse_args(arguments)
    if args.size < 1:
        parser.error(f"--size is above 0, not {args.size}")
    with in_one_sentence("digits_pair.py", OSError):
        if args.folder.exists():
            raise FileExistsError(f"{args.folder} exists: name another folder")
        write_world(args.folder, args.size, args.seed)
    flags = f'--texts {args.folder}/prompts.txt --test {args.folder}/test.jsonl --prompt "" --max-new-tokens 48'
    print(f"python recipes/compare.py {args.folder}/recipe.yaml -o {args.folder}/compared {flags} --batch-size 100")


if __name__ == "__main__":
    run_script("digits_pair.py", main)
