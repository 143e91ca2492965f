"""The documentation: its Python runs on the demo's checkpoints, its commands and messages are those of the code."""

import ast
import json
import re
import shlex
import tomllib
import warnings
from importlib.util import find_spec

import pytest
import site_pages
import yaml
from peft import LoraConfig
from test_readme import ROOT, blocks

from drift_peft import DriftConfig
from drift_peft.cli.commands import parser
from drift_peft.tuner import describe, own_fields

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TEXTS = {**{page: DOCS / page for page in PAGES}, "README.md": ROOT / "README.md"}
TEXTS |= {name: ROOT / name for name in ("recipes/README.md", "recipes/EVALUATION.md", "CONTRIBUTING.md")}


def read(page):
    return TEXTS[page].read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page))])
def test_the_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch, capsys):
    """As it stands, on the demo's models; a block may use what the blocks above it have made."""
    monkeypatch.chdir(tmp_path)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(read(page)):
            exec(compile(block, page, "exec"), names)
    if page.startswith("guides/"):
        assert "guided_steps': 2" in capsys.readouterr().out
        assert (tmp_path / "merged" / "model.safetensors").is_file()
    if page == "guides/own-loop.md":
        assert (tmp_path / "half" / "model.safetensors").is_file()
        assert names["model"].peft_config["default"].drift_steps == 2  # continued from the saved adapter


@pytest.mark.parametrize("page", TEXTS)
def test_every_block_can_be_read(page):
    """Python compiles, YAML is YAML, and each drift-peft command line is one that its parser takes."""
    for block in blocks(read(page)):
        compile(block, page, "exec")
    for block in blocks(read(page), "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for words in commands(read(page)):
        parser().parse_args(words)


def commands(text):
    """The drift-peft command lines of a page's plain blocks, without comments."""
    for block in blocks(text, ""):
        for line in re.findall(r"^drift-peft (.+)$", block.replace("\\\n", " "), re.M):
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", TEXTS)
def test_scripts_and_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(read(page), ""):
        for target in re.findall(r"^make ([\w-]+)", block, re.M):
            assert f"\n{target}:" in makefile
        for script in re.findall(r"python (recipes/\S+\.py|benchmarks/\S+\.py)", block):
            assert (ROOT / script).is_file()
        for module in re.findall(r"python -m (drift_peft[\w.]*)", block):
            assert find_spec(module)


@pytest.fixture(scope="module")
def messages():
    """Every string of the code, with … where a value stands."""
    found = []
    for folder in ("drift_peft", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_each_message_of_troubleshooting_stands_in_the_code(messages):
    quoted = re.findall(r"^> (.+)$", read("troubleshooting.md"), re.M)
    assert len(quoted) > 30
    assert not [message for message in quoted if message not in messages]


def test_every_field_is_documented_from_one_source():
    """help(DriftConfig) and the site name each field that is not LoRA's, with type, default, range and meaning."""
    page, text = site_pages.own_fields(), DriftConfig.__doc__
    fields = describe(DriftConfig, own_fields(DriftConfig, LoraConfig))
    assert {field.name for field in fields} > {name for name in DriftConfig.__dataclass_fields__ if "drift_" in name}
    for field in fields:
        head = f"    {field.name} (`{field.type}`, defaults to `{field.default}`):\n"
        said = re.sub(r"\s+", " ", text.partition(head)[2])
        assert field.meaning and said.startswith(f" {field.meaning}" + f" Allowed: {field.range}." * bool(field.range))
        assert f"### `{field.name}`\n\n{site_pages.in_markdown(field.meaning)}" in page
    automatic = {"prior_sha256", "drift_steps", "quantization", "drift_log_kinds"}
    assert {field.name for field in fields if not field.range} == automatic


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("drift_alpha", -0.1),
        ("drift_scale", "cosine"),
        ("drift_target", "expert"),
        ("drift_target", "base"),
        ("drift_scale", "decoupled"),
        ("drift_rank", 0),
        ("drift_norm", "layer"),
        ("drift_sketch", 0),
        ("drift_spectrum", 4.5),
        ("drift_modules", []),
        ("drift_alpha_pattern", {"q_proj": -1.0}),
        ("drift_warmup_steps", -1),
        ("drift_decay_steps", 0),
        ("init_lora_weights", "pissa"),
        ("prior", None),
    ],
)
def test_what_a_field_does_not_allow_is_refused(name, outside):
    with pytest.raises(ValueError, match=name.removeprefix("init_")):
        DriftConfig(**{"prior": "p.safetensors", name: outside})


def test_pages_take_in_what_stands_elsewhere():
    link = '[x](../../recipes/README.md#y "insert {} Layouts of the data")'
    text = site_pages.whole_page(link.format("section"), "guides/data.md")
    assert text.lstrip().startswith("Each row is read by its own keys") and "## Things to know" not in text
    rest = site_pages.whole_page(link.format("all but"), "guides/recipes.md")
    assert text.strip() not in rest and "## Things to know" in rest
    assert site_pages.whole_page("[r](../../benchmarks/RESULTS.md#x)", "guides/data.md") == "[r](../results.md#x)"
    assert site_pages.whole_page("![i](../images/idea.svg)", "guides/data.md") == "![i](../images/idea.svg)"
    assert site_pages.whole_page("[s](../recipes/score.py)", "limits.md") == "s"
    assert site_pages.in_markdown("a_b * `<c_d>`\n <e>") == r"a\_b \* `<c_d>` &lt;e>"
    with pytest.raises(ValueError, match="no file"):
        site_pages.whole_page("[s](nowhere.md)", "limits.md")


def test_what_a_page_inserts_is_a_link_where_it_is_read_as_a_file():
    pages = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
    inserts = {name: re.findall(r'\[.+\]\((\S+?)(?:#\S+)? "insert', text) for name, text in pages.items()}
    assert sum(map(len, inserts.values())) > 10
    for name, targets in inserts.items():
        assert all("://" in target or (DOCS / name).parent.joinpath(target).exists() for target in targets)
        assert '"insert' not in site_pages.whole_page(pages[name], name)


def headings(text):
    """The anchors of a Markdown file, as GitHub makes them of its headings."""
    told = re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in told}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere_where_a_page_is_read_as_a_file(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)[^)]*\)", read(page)):
        path = TEXTS[page].parent / target if target else TEXTS[page]
        assert path.exists(), target
        assert not anchor or anchor in headings(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_start_lists_every_page():
    """Where it is read as a file there is no other list; pages that insert a whole file are listed as that file."""
    listed = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s:]+)\)", read("index.md"))}
    whole = re.compile(r'\[[^\]]*\]\((\S+) "insert (?:file|all but [^"]+)"\)\s*')
    for page in set(PAGES) - {"index.md"}:
        inserted = whole.fullmatch(read(page))
        assert (TEXTS[page].parent / inserted[1] if inserted else TEXTS[page]).resolve() in listed, page


def test_the_recipe_that_the_recipes_page_shows_is_one(tmp_path):
    sft_vlm, arguments = pytest.importorskip("sft_vlm"), pytest.importorskip("parts.arguments")
    file = tmp_path / "recipe.yaml"
    file.write_text(blocks(read("recipes/README.md"), "yaml")[0], encoding="utf-8")
    run, drift, train = arguments.parse(["--config", str(file), "--use-cpu"], sft_vlm.__doc__)
    assert run.keep_images == "pictures" and drift.r == 16 and train.num_train_epochs == 3


def test_links_to_the_repository_have_its_address(monkeypatch):
    monkeypatch.setenv("DRIFT_PEFT_URL", "https://example.org/d/")
    link = "[s](https://example.org/d/blob/main/recipes/score.py)"
    assert site_pages.whole_page("[s](../recipes/score.py)", "limits.md") == link


def test_the_command_line_s_page_has_every_verb():
    page = site_pages.commands()
    for one in site_pages.all_parsers(parser()):
        assert f"## `{one.prog}`" in page
        for flag in one._option_string_actions:
            assert flag in page


def test_the_page_of_plugins_names_the_versions_that_are_tested():
    page = (ROOT / "docs" / "guides" / "plugins.md").read_text(encoding="utf-8")
    for tool, file in (("axolotl", "axolotl"), ("ms-swift", "ms_swift"), ("LLaMA-Factory", "llama_factory")):
        listed = (ROOT / "tests" / "integrations" / f"{file}.txt").read_text(encoding="utf-8")
        version = re.search(rf"^{tool.replace('LLaMA-Factory', 'llamafactory')}==(\S+)", listed, re.M)[1]
        assert f"{tool} {version}" in page


def test_versions_are_those_that_are_taken_and_tested():
    """Where a text says from which version on a package is taken, or which one was tested."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*required["dependencies"], *required["optional-dependencies"]["recipes"]]
    lowest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(required), re.M))
    files = ("constraints.txt", "constraints-oldest.txt")
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    pinned, oldest = (dict(re.findall(r"^([\w-]+)==(\S+)", text, re.M)) for text in texts)
    assert all(f"{oldest[name]}.".startswith(f"{lowest[name]}.") for name in oldest.keys() & lowest.keys() - {"torch"})
    said = 0
    for path in [*TEXTS.values(), ROOT / "CHANGELOG.md"]:
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        for name, version in re.findall(
            r"\b(torch|PEFT|transformers|bitsandbytes|huggingface_hub|TRL) from ([\d.]*\d)", text
        ):
            assert lowest[name.lower()] == version, path
            said += 1
    assert said > 5
    limits = read("limits.md")
    (versions,) = re.findall(
        r"The tests with the pinned versions have TRL (\S+)\. Those with the oldest versions have TRL (\S+)\.", limits
    )
    assert all(f"{file['trl']}.".startswith(f"{one}.") for file, one in zip((pinned, oldest), versions, strict=True))
    for name in ("PEFT", "huggingface_hub"):
        (version,) = re.findall(rf"- \*\*{name} ([\d.]+)\*\* ", limits)
        assert oldest[name.lower()].startswith(f"{version}.")
    assert f"[families](families.md) is of {pinned['transformers'].rpartition('.')[0]}." in limits


def test_the_start_says_what_the_small_extras_bring():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in ("keep", "report"):
        (row,) = re.findall(rf"^\| `\[{extra}\]` \| (.+) \|$", read("index.md"), re.M)
        assert all(re.split(r"\W*>=", package)[0] in row for package in extras[extra])


def test_the_families_page_has_every_type():
    printed = (ROOT / "benchmarks" / "results" / "families.txt").read_text(encoding="utf-8")
    types, page = re.findall(r"^│ ([\w.-]+) ", printed, re.M), site_pages.families()
    assert len(types) == json.loads(printed.splitlines()[-1])["types"]
    assert all(f"| `{name}` |" in page for name in types)
