"""Ctrl-C in a distillation and in its judge; --config, and the values in it, as they may be written."""

import os
import signal
import subprocess
import sys
import time

import distill
import pytest
import sft_vlm
from distillations import journal_lines, result, right, save_questions
from openai_server import OpenAI
from parts.arguments import parse
from parts.journal import journal_path
from processes import Program
from recipe_runs import RECIPES


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_says_where_the_answers_are_and_the_same_command_goes_on(tmp_path):
    source, output = save_questions(tmp_path, 40), tmp_path / "out.parquet"
    journal = journal_path(output)
    with OpenAI(right, seconds=0.1) as server:
        flags = ["--server", server.url, "--model", "teacher", "--concurrency", "4"]
        command = [str(source), "-o", str(output), *flags]
        program = Program(tmp_path, RECIPES / "distill.py", *command, HF_DATASETS_CACHE=str(tmp_path / "cache"))
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            assert program.process.is_alive(), program.ended()
            time.sleep(0.02)
        os.kill(program.process.pid, signal.SIGINT)
        status, out, err = program.ended()
        told = f"distill.py: stopped; the answers so far are in {journal}: run the same again to go on"
        assert (status, out) == (130, "") and err.splitlines()[-1] == told and "Traceback" not in err
        paid = len(journal_lines(output)) - 1
        assert 9 <= paid < 40 and not output.exists()
        server.asked.clear()
        distill.main(command)
    assert len(server.asked) == 40 - paid and len(result(output)) == 40


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_the_judge_ends_at_ctrl_c_without_a_traceback():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "parts.equality"], cwd=RECIPES, **pipes) as judge:
        assert judge.stdout.readline() == "ready\n"
        judge.send_signal(signal.SIGINT)
        _, err = judge.communicate(timeout=60)
    assert (judge.returncode, err) == (-signal.SIGINT, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_a_script_imports_is_one_sentence(tmp_path):
    """Torch stands for all that takes seconds."""
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(RECIPES / "sft_vlm.py")], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "sft_vlm.py: stopped\n")


@pytest.mark.parametrize("written", [["--config={}"], ["--config", "{}"], ["--config", "none.yaml", "--config={}"]])
def test_a_configuration_may_be_named_as_any_flag(written, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("{base: b, data: d, prior: p.safetensors, r: 8, max_steps: 5}")
    flags = [part.format(config) for part in written]
    run, drift, train = parse(["--use-cpu", *flags, "--max-steps", "-1"], sft_vlm.__doc__)
    assert (run.base, drift.r, train.max_steps) == ("b", 8, -1)


MIN_LR = "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs"
MEANT = [  # in a YAML, setting, value
    (f"{MIN_LR}: {{min_lr: 1e-6}}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
    (f"{MIN_LR}: {{min_lr: '1e-6'}}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
    (f"{MIN_LR}: '{{min_lr: 1e-6}}'", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
    ("processor_kwargs: {max_pixels: 1e6, do_resize: 'no'}", "processor_kwargs", {"max_pixels": 10**6, "do_resize": 0}),
    ("drift_alpha_pattern: {mlp: 1e-1, attn: .5}", "drift_alpha_pattern", {"mlp": 0.1, "attn": 0.5}),
    ("learning_rate: 1e-4", "learning_rate", 1e-4),
    ("learning_rate: '1E-4'", "learning_rate", 1e-4),
    ("max_tokens: 4e3", "max_tokens", 4000),
    ("r: '8'", "r", 8),
    ("bf16: 'no'", "bf16", False),
    ("merge: 'Yes'", "merge", True),
    ("gradient_checkpointing: 0", "gradient_checkpointing", False),
    ("drift_modules: attn", "drift_modules", ["attn"]),
    ("drift_spectrum: 0.5", "drift_spectrum", 0.5),
    ("save_strategy: no", "save_strategy", "no"),
    ("run_name: 2024-01-01", "run_name", "2024-01-01"),
    ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
    ("reference: null", "reference", None),
]


@pytest.fixture
def written(tmp_path):
    """The settings of a YAML with one line more."""

    def read(line):
        (tmp_path / "a.yaml").write_text(f"base: b\ndata: d\nprior: p.safetensors\nuse_cpu: true\n{line}\n")
        return parse(["--config", str(tmp_path / "a.yaml")], sft_vlm.__doc__)

    return read


@pytest.mark.parametrize(("line", "name", "value"), MEANT)
def test_a_value_is_read_as_it_is_meant(line, name, value, written):
    (found,) = (getattr(part, name) for part in written(line) if hasattr(part, name))
    assert found == value and (type(found) is type(value) or name == "save_strategy")


@pytest.mark.parametrize(
    ("more", "named"), [("", "k"), ("\nkeep_weight: 0", None), ("\nkeep_weight: 0\nreplay: 0.1", "k")]
)
def test_a_keep_set_without_weight_is_none(more, named, written):
    assert written(f"keep: k{more}")[0].keep == named


@pytest.mark.parametrize(("line", "sentence"), [
    ("logging_steps: null", "logging_steps has no value: give it one, or leave the key out"),
    ("max_tokens:", "max_tokens has no value: give it one, or leave the key out"),
    ("max_tokens: 4.5", "max_tokens takes a whole number, got 4.5"),
    ("merge: 'perhaps'", "merge takes yes or no, got 'perhaps'"),
    ("r: [8]", "r takes a whole number, got [8]"),
    ("learning_rate: fast", "learning_rate takes a number, got 'fast'"),
    ("run_name: yes", "run_name takes a text, got True"),
    ("processor_kwargs: 5", "processor_kwargs takes a text or settings such as {name: value}, got 5"),
    ("processor_kwargs: many", "processor_kwargs takes settings such as {name: value}, got 'many'"),
    ("on_bad: 5", "on_bad takes one of drop, fail, not 5"),
    ("a: [", "is no YAML: while parsing"),
    ("r: 4\nlora_alpha: 8\nr: 8", "a.yaml the key r stands twice, in lines 5 and 7: take one of them out"),
    ("drift_alpha_pattern: {mlp: 1, mlp: 2}", "a.yaml the key mlp stands twice, in line 5: take one of them out"),
    ("5: 5", "is no recipe: it has to be keys with their values, such as r: 16"),
    (f"a: {'[' * 2000}", "is no YAML: "),
])  # fmt: skip
def test_or_refused_in_a_sentence(line, sentence, written, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        written(line)
    assert sentence in str(error.value) and "\n" not in str(error.value)
