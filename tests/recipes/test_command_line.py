"""recipes/*.py as they are typed: flags, mistakes, --help, Ctrl-C, and terminals without Unicode."""

import importlib
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import data
import grimp
import pytest
from parts.command_line import Parser, in_one_sentence, run_script
from processes import run_program
from recipe_runs import CONFIGS, RECIPES
from terminals import terminal

from drift_peft.atomic import write_json
from drift_peft.cli.terminal import spell_out

SCRIPTS = sorted(file.stem for file in RECIPES.glob("*.py"))
DEFAULTS = {  # script -> some of its flags, with their defaults
    "compare": {"--held-out HELD_OUT": "100", "--merge-first MERGE_FIRST [MERGE_FIRST ...]": "0.5; for held LoRA, 1"},
    "data": {"--split SPLIT": "train", "--on-bad {drop,fail}": "drop"},
    "distill": {"--model MODEL": "russwang/ThinkLite-VL-7B", "--max-tokens MAX_TOKENS": "4096"},
    "evaluate": {"--split SPLIT": "test", "--max-new-tokens MAX_NEW_TOKENS": "16384"},
    "sft_vlm": {"--on-long {drop,fail}": "drop", "--drift-alpha DRIFT_ALPHA": "0.3", "--merge [MERGE]": "False"},
}


def ended(capsys, script, *arguments):
    """Exit status of main(), stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main([*map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def test_no_script_imports_another_one(tmp_path):
    code = f"""
import importlib, sys
sys.path.insert(0, {str(RECIPES)!r})
scripts = set(sys.argv[1:])
for script in sys.argv[1:]:
    importlib.import_module(script)
    assert scripts & sys.modules.keys() == {{script}}, (script, scripts & sys.modules.keys())
    del sys.modules[script]
"""
    run_program(tmp_path, "-c", code, *SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_flags_with_dashes_their_defaults_and_examples(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = ended(capsys, script, "--help")
    assert status == 0 and not err
    assert f"\nexamples:\n    python recipes/{script}.py " in out
    assert "--help" in out and not re.search(r"--[\w-]*_", out)
    assert "default: None" not in out and "default: ==" not in out
    words = " ".join(out.split())
    for flag, default in DEFAULTS.get(script, {}).items():
        assert re.search(rf"{re.escape(flag)} [^()]*\(default: {re.escape(default)}\)", words), flag
    assert "--no-" not in out or not re.search(r"--no-[\w-]+ [^-]*\(default: ", words)  # a switch has no value to tell


def test_the_help_of_a_configuration_shows_its_values(capsys):
    _, out, _ = ended(capsys, "sft_vlm", "--config", CONFIGS / "qwen2_5_vl_7b_r1.yaml", "--help")
    assert re.search(r"--drift-alpha DRIFT_ALPHA [^()]*\(default: 0\.3\)", " ".join(out.split()))
    assert out.index("--config FILE") < out.index("--base BASE")


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("data", ["--spilt", "x"], "unknown flag --spilt; did you mean --split?"),
        ("data", ["a", "-o", "b", "--over"], "unknown flag --over; did you mean --overwrite?"),  # no abbreviations
        ("data", ["a", "-o", "b", "--on_bad=fial"], "--on-bad takes one of drop, fail, not fial; did you mean fail?"),
        ("data", ["a", "b", "-o", "c"], "unexpected argument b; see data.py --help"),
        ("data", [], "the following arguments are required: source, -o/--output"),
        *[("data", ["a", "-o", "b", *flags], "settings of the processor are for counting tokens as a base does: name that base with --model")  # noqa: E501
          for flags in (["--processor-kwargs", '{"a": 1}'], ["--chat-template-path", "c"], ["--trust-remote-code"])],
        ("data", ["a", "-o", "b", "--max_tokens", "5"], "--max-tokens does nothing without the base whose tokens are counted: name it with --model, or leave --max-tokens out"),  # noqa: E501
        *[("evaluate", ["--model", "m", "-o", "b", "--keep", "k", *flags], f"{flags[0].partition('=')[0]} does nothing with --keep, which has its questions and answers: leave it out")  # noqa: E501
          for flags in (["--split", "test"], ["--images", "i"], ["--category", "c"], ["--prompt=", "--json"], ["--max-new-tokens", "5"])],  # noqa: E501
        ("evaluate", ["--model", "m", "-o", "b", "--data", "d", "--force"], "--force does nothing without --adapter: name it, or leave --force out"),  # noqa: E501
        *[("distill", ["a", "-o", "b", *flags], f"{flags[0]} does nothing without --server: name it, or leave {flags[0]} out")  # noqa: E501
          for flags in (["--api-key-env", "K"], ["--concurrency", "1"], ["--timeout", "5"], ["--retries", "6"])],
        *[("distill", ["a", "-o", "b", "--server", "http://a", *flags], f"{flags[0]} does nothing with --server, which loads the model itself: leave it out")  # noqa: E501
          for flags in (["--batch-size", "8"], ["--trust-remote-code"])],
        *[("compare", ["r", "-o", "b", "--ways", "base", "sft", *flags], f"{flags[0]} does nothing with --ways base sft: leave it out")  # noqa: E501
          for flags in (["--scales", "0.5"], ["--texts", "t"], ["--merge-first", "0.5"])],
        *[("compare", ["r", "-o", "b", "--ways", "base", "transplant", *flags], f"{flags[0]} does nothing with --ways base transplant: leave it out")  # noqa: E501
          for flags in (["--search", "3"], ["--seeds", "0", "1"])],
        ("distill", ["a", "--max-token", "5"], "unknown flag --max-token; did you mean --max-tokens?"),
        ("distill", ["a", "-o", "b", "--batch_size", "x"], "--batch-size takes a whole number, got x"),
        ("evaluate", ["--max_new_token", "5"], "unknown flag --max_new_token; did you mean --max-new-tokens?"),
        ("evaluate", ["--max_new_tokens", "x"], "--max-new-tokens takes a whole number, got x"),
        ("evaluate", ["--limit", "40"], "unknown flag --limit; see evaluate.py --help"),
        *[("distill", ["a", "-o", "b", *server, flag, number], f"{flag} is a number {told}, got {number}")
          for server, flag, number, told in (
              ([], "--limit", "-1", "of at least 1"), ([], "--limit", "0", "of at least 1"),
              ([], "--batch-size", "0", "of at least 1"), ([], "--batch-size", "-1", "of at least 1"),
              ([], "--max-tokens", "0", "of at least 1"), ([], "--temperature", "-0.5", "of at least 0"),
              ([], "--temperature", "nan", "of at least 0"),
              (["--server", "http://a"], "--concurrency", "0", "of at least 1"),
              (["--server", "http://a"], "--retries", "-1", "of at least 0"),
              (["--server", "http://a"], "--timeout", "0.0", "above 0"),
              (["--server", "http://a"], "--timeout", "inf", "above 0"),
          )],
        *[(script, [*needed, "-o", "b", flag, "0"], f"{flag} is a number of at least 1, got 0")
          for script, needed, flag in (
              ("data", ["a", "--model", "m"], "--max-tokens"),
              ("evaluate", ["--model", "m", "--data", "d"], "--batch-size"),
              ("evaluate", ["--model", "m", "--data", "d"], "--max-new-tokens"),
          )],
        ("score", ["--bse", "x"], "unknown flag --bse; did you mean --base?"),
        ("score", ["--zzzzzz"], "unknown flag --zzzzzz; see score.py --help"),
        ("plot_run", ["run.json"], "the following arguments are required: picture"),
        ("plot_run", ["run.json", "a.png", "--hlep"], "unknown flag --hlep; did you mean --help?"),
        ("sft_vlm", ["--confg", "x"], "unknown flag --confg; did you mean --config?"),
        ("sft_vlm", ["--leraning-rate", "x"], "unknown flag --leraning-rate; did you mean --learning-rate?"),
        ("sft_vlm", ["--learning_rate", "x"], "--learning-rate takes a number, got x"),
        ("sft_vlm", ["--drift-norm", "weigth"], "--drift-norm takes one of factor, weight, not weigth; did you mean weight?"),  # noqa: E501
        ("sft_vlm", ["--config"], "argument --config: expected one argument"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence_with_the_nearest_name(script, arguments, sentence, capsys):
    status, out, err = ended(capsys, script, *arguments)
    assert (status, out, err) == (2, "", f"{script}.py: error: {sentence}\n")


NO_RECIPE = "recipe nowhere.yaml cannot be read: No such file or directory; name a YAML file such as "
EARLY = [  # what is told before torch is imported, and how it begins
    *((f"{script}.py", ["--help"], None) for script in ("compare", "data", "distill", "evaluate", "plot_run", "score")),
    ("data.py", ["a.jsonl", "--image", "b", "-o", "c.parquet"], "unknown flag --image; did you mean --images?"),
    ("data.py", ["nowhere.jsonl", "-o", "a.parquet"], "there is no file nowhere.jsonl here: "),
    ("distill.py", ["nowhere.jsonl", "-o", "a.txt"], "output a.txt is no parquet file"),
    ("evaluate.py", ["--model", "m", "--data", "nowhere.jsonl", "-o", "a.json"], "there is no data nowhere.jsonl"),
    ("compare.py", ["nowhere.yaml", "-o", "a"], NO_RECIPE),
    ("sft_vlm.py", ["--config", "nowhere.yaml"], NO_RECIPE),
    ("sft_vlm.py", ["--r", "8", "--config=nowhere.yaml"], NO_RECIPE),
    ("sft_vlm.py", ["--config"], "argument --config: expected one argument"),
]
PROBE = """
import contextlib, io, json, runpy, sys
folder, *commands = sys.argv[1:]
sys.path.insert(0, folder)
for command in map(json.loads, commands):
    sys.argv, out, err = command, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        runpy.run_path(f"{folder}/{command[0]}", run_name="__main__")
        err.write("It ran.")
    imported = {"torch", "transformers", "peft", "bitsandbytes", "trl"} & sys.modules.keys()
    print(json.dumps([out.getvalue(), err.getvalue(), *imported]))
"""


def test_help_and_slips_take_no_import_of_torch(tmp_path):
    commands = [json.dumps([script, *arguments]) for script, arguments, _ in EARLY]
    command = [
        sys.executable,
        "-c",
        PROBE,
        RECIPES.as_posix(),
        *commands,
    ]  # unlike those of processes.py, with no import
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=tmp_path, check=True)
    for (script, arguments, sentence), line in zip(EARLY, done.stdout.splitlines(), strict=True):
        out, err, *imported = json.loads(line)
        assert not imported, (script, arguments)
        if sentence is None:
            assert out.startswith(f"usage: {script} ") and not err
        else:
            assert not out and err.startswith(f"{script}: error: {sentence}") and err.count("\n") == 1


def test_values_keep_their_underscores():
    parser = Parser("x.py", "What it does.\n\n    python x.py\n")
    parser.add_argument("source")
    parser.add_argument("--some-name")
    for flag in ("--some-name", "--some_name"):
        for arguments in ([flag, "a_b"], [f"{flag}=a_b"], [f"{flag}=--a_b"]):
            args = parser.parse_args([*arguments, "--", "--c_d"])
            assert (args.some_name.lstrip("-"), args.source) == ("a_b", "--c_d")


def test_names_that_are_not_in_utf8_are_refused_before_the_work(capsys, monkeypatch):
    status, _, err = ended(capsys, "data", "a.jsonl", "-o", "b\udcff.parquet")
    told = r"data.py: error: argument 'b\udcff.parquet' is not in UTF-8: rename that file or folder"
    assert (status, err) == (2, told + "\n")
    monkeypatch.setattr(os, "getcwd", lambda: "/a\udcff")
    status, _, err = ended(capsys, "score", "--base", "a", "--drift", "b")
    assert status == 2 and r"error: the working folder '/a\udcff' is not in UTF-8: rename it" in err


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"r.json could not be written \(\[Errno 28\] No space left"):
        write_json(tmp_path / "r.json", {"a": 1})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content, sentence", [
    (None, "run.json cannot be read (No such file or directory): name the run.json that sft_vlm.py left"),
    ("{torn", "run.json is no JSON (Expecting property name"),
    ("{}", "run.json has no history: name the run.json of a run that sft_vlm.py has finished"),
])  # fmt: skip
def test_a_run_that_cannot_be_drawn_is_one_sentence(content, sentence, tmp_path, capsys):
    if content:
        (tmp_path / "run.json").write_text(content)
    status, out, err = ended(capsys, "plot_run", tmp_path / "run.json", tmp_path / "run.png")
    assert status == 1 and not out and sentence in err
    assert err.startswith("plot_run.py: error: ") and err.count("\n") == 1 and not (tmp_path / "run.png").exists()


INTERRUPTED = {  # script -> what Ctrl-C falls into, arguments
    "compare": ("parts.arguments.parse", ["recipe.yaml", "-o", "compared"]),
    "data": ("parts.loading.load_messages", ["a.jsonl", "-o", "a.parquet"]),
    "digits_pair": ("drift_peft.demo.world.make_samples", ["digits"]),
    "distill": ("parts.loading.load_messages", ["a.jsonl", "-o", "a.parquet", "--server", "http://127.0.0.1:9"]),
    "evaluate": ("parts.loading.load_messages", ["--model", "m", "--data", "a.jsonl", "-o", "a.json"]),
    "plot_run": ("parts.curves.plot_run", ["run.json", "a.png"]),
    "score": ("parts.outputs.read_outputs", ["--base", "a", "--drift", "a"]),
    "sft_vlm": ("parts.arguments.parse", []),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_is_one_sentence(script, capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    place, arguments = INTERRUPTED[script]
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("run.json").write_text('{"history": []}')
    Path("recipe.yaml").write_text("base: model")
    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPES / f"{script}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert end.value.code == 130 and not out and err.splitlines()[-1] == f"{script}.py: stopped"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_script_is_imported_is_one_sentence(script, tmp_path):
    """difflib stands for any library here: the first that each script imports, and one that loses the interrupt."""
    lost = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException as error:\n    pass\n"
    (tmp_path / "difflib.py").write_text(lost)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(RECIPES / f"{script}.py"), "--help"]
    options = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # a shell's background jobs ignore it
    options |= {"env": {**os.environ, "PYTHONPATH": paths}, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{script}.py: stopped\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_package_that_is_missing_is_one_sentence(script, tmp_path):
    """As above, difflib stands for one that is not there."""
    (tmp_path / "difflib.py").write_text("import pakcage.inside")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(RECIPES / f"{script}.py"), "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    extra = "demo" if script == "digits_pair" else "recipes"
    told = f'{script}.py: error: pakcage is missing: pip install "drift_peft[{extra}]"'
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (1, "", told)


@pytest.mark.parametrize("script", SCRIPTS)
def test_libraries_tell_of_no_kernels_while_a_script_is_imported(script, tmp_path):
    """As above, difflib stands for them. Others say what they have to say."""
    logged = "import logging\nfor name in ({}):\n    logging.getLogger(name).warning(f'{name} warns')\nimport pakcage"
    names = "bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree", "transformers"
    (tmp_path / "difflib.py").write_text(logged.replace("{}", ", ".join(map(repr, names)), 1))
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(RECIPES / f"{script}.py"), "--help"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if line.endswith(" warns")] == ["transformers warns"]


def test_a_package_that_is_missing_later_is_the_same_sentence(tmp_path, capsys, monkeypatch):
    """optuna is asked for before anything is measured; and no answer is wrong because the judge cannot start."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("compare.read_recipe", lambda _: {})
    status, _, err = ended(capsys, "compare", "recipe.yaml", "-o", tmp_path / "compared", "--search", "2")
    assert (status, err) == (1, 'compare.py: error: optuna is missing: pip install "drift_peft[recipes]"\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pint" else name)
    with pytest.raises(ModuleNotFoundError) as missed:
        importlib.reload(importlib.import_module("parts.answers"))
    assert missed.value.name == "pint" and not (tmp_path / "compared").exists()


@pytest.mark.parametrize("part", ["loading", "lengths", "replay", "template", "parquet"])
def test_data_and_training_need_no_judge(part):
    """Nor the packages that it compares answers with."""
    imports = grimp.build_graph("parts", cache_dir=None)
    assert not imports.chain_exists(importer=f"parts.{part}", imported="parts.answers")
    assert imports.chain_exists(importer="parts.scoring", imported="parts.answers")  # is read


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("other", [ValueError, RuntimeError, SystemError])
def test_ctrl_c_that_a_library_turns_into_another_error_is_the_same_sentence(other, capsys):
    def main():
        with in_one_sentence("x.py", ValueError):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as interrupt:
                raise other("of arrow, or of torch") from interrupt

    def mistaken():
        with in_one_sentence("x.py", ValueError):
            raise ValueError("a mistake")

    with pytest.raises(SystemExit) as end:
        run_script("x.py", main)
    assert (end.value.code, *capsys.readouterr()) == (130, "", "x.py: stopped\n")
    with pytest.raises(SystemExit) as end:  # the next run in this process
        run_script("x.py", mistaken)
    assert (end.value.code, *capsys.readouterr()) == (1, "", "x.py: error: a mistake\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_shows_tables_and_mistakes(encoding, tmp_path, monkeypatch):
    lines = [{"question": "a", "answer": answer} for answer in (r"\boxed{5}", "5")]
    (tmp_path / "Δ−…a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        with terminal(monkeypatch, encoding) as printed:
            status = 0
            try:
                run_script("data.py", lambda: data.main(["Δ−…a.jsonl", *arguments]))
            except SystemExit as end:
                status = end.code
            return status, *printed()

    dots = "..." if encoding == "ascii" else "…"
    status, out, _ = run("-o", "Δ.parquet", "--boxed")
    assert status == 0 and f"Delta-{dots}a.jsonl -> Delta.parquet" in out
    assert (
        f"answer without a box | 1      | sample 2 of Delta-{dots}a.jsonl has no \\boxed{{{dots}}} in its answer" in out
    )
    status, out, err = run("-o", "Δ.parquet", "--boxed")
    assert (status, out) == (1, "") and err.endswith(
        "data.py: error: output Delta.parquet exists: name another file, or pass --overwrite" + os.linesep
    )


def test_help_is_readable_without_unicode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    spell_out(sys.stdout, sys.stderr)
    with pytest.raises(SystemExit) as end:
        importlib.import_module("sft_vlm").main(["--help"])
    stream.flush()
    words = " ".join(stream.buffer.getvalue().decode("ascii").split())
    assert end.value.code == 0 and "What the bias points to: Delta - sBA, Delta, the SVD's own factors" in words


def test_a_terminal_with_unicode_stays_as_it_is(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    spell_out(sys.stdout, sys.stderr)
    print("Δ − … ‖", file=stream, flush=True)
    assert stream.errors == "strict" and stream.buffer.getvalue().decode("utf-8").strip() == "Δ − … ‖"
