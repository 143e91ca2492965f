"""What is published: the wheel in an environment of its own, and the source distribution, which still has its tests."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import drift_peft

ROOT = Path(__file__).parents[2]
STUDY = "benchmarks/digits_study/checkpoints/"  # 8 MB that the source distribution does without
ADDRESS = "https://example.org/drift_peft"


def build(kind, folder, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, **environment})
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"), DRIFT_PEFT_URL="")


@pytest.fixture(scope="module")
def metadata(wheel):
    return _metadata(wheel)


def _metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Its dependencies are lent by this one; the package itself, which may be installed there too, comes second."""
    venv.create(tmp_path / "env", with_pip=False)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    install = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    paths = {"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    site.joinpath("lent.pth").write_text(sysconfig.get_path("purelib"))

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def output(*command):
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert output(python, "-c", "import drift_peft; print(drift_peft.__path__[0])") == str(site / "drift_peft")
    assert output(scripts / "drift-peft", "--version") == f"drift-peft {drift_peft.__version__}"
    assert "drift-peft prior build" in output(scripts / "drift-peft", "prior", "build", "--help")


def test_what_is_no_code_is_in_the_wheel(wheel):
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "drift_peft").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("drift_peft/")}
    assert packed == {name for name in inside if "__pycache__" not in name}
    assert {"drift_peft/py.typed", "drift_peft/__init__.pyi", "drift_peft/keeping/page.html"} <= packed


def test_the_source_distribution_has_all_but_the_study_s_checkpoints(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in listed.stdout.split("\n") if name and not name.startswith(".")}
    assert packed - {"PKG-INFO", ".gitignore"} == {name for name in tracked if not name.startswith(STUDY)}


def test_the_page_on_an_index_has_no_dead_link(metadata):
    page = metadata.partition("\n\n")[2]
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert targets and all(target.startswith("https://") for target in targets)
    assert "The table names what is left unsteered" in page  # the link's text


@pytest.mark.skipif(ROOT.joinpath("PKG-INFO").exists(), reason="a source distribution has its metadata already")
def test_links_lead_to_the_files_of_this_version(tmp_path):
    text = _metadata(build("wheel", tmp_path, DRIFT_PEFT_URL=ADDRESS))
    tag = f"v{drift_peft.__version__}"
    assert f"Project-URL: Repository, {ADDRESS}\n" in text
    for target in re.findall(rf"\]\({re.escape(ADDRESS)}/(?:blob|raw)/{tag}/([^)#]+)", text):
        assert (ROOT / target).exists(), target
    assert f"]({ADDRESS}/raw/{tag}/docs/images/idea.svg)" in text


def test_the_stub_names_what_is_public():
    stub = ROOT.joinpath("drift_peft/__init__.pyi").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^from \.(\w+) import (\w+) as \2$", stub, re.M)) == sorted(
        (room, name) for name, room in drift_peft._ROOMS.items()
    )


def test_the_citation_is_of_this_version():
    citation = ROOT.joinpath("CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {drift_peft.__version__}\n" in citation


def test_the_lowest_versions_are_those_that_are_tested():
    """A range's lower end in pyproject.toml is what `make test-oldest` installs."""
    project = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")
    oldest = ROOT.joinpath("constraints-oldest.txt").read_text(encoding="utf-8")
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)[",]', project))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", oldest, re.M))
    assert {"peft", "transformers", "accelerate", "bitsandbytes", "huggingface_hub"} <= {*pinned}
    for name in {*pinned} & {*lowest} - {"torch"}:  # there is no build of an older torch without CUDA to test with
        assert f"{pinned[name]}.".startswith(f"{lowest[name]}."), name
