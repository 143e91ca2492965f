"""The page of a prior: what it says, that it needs nothing from outside, and that it works in a browser."""

import html
import json
import re
import sys

import pytest
from browser import browser, in_browser
from sample_prior import BETWEEN, sample_prior

from drift_peft import ReasoningPrior
from drift_peft.checkpoints import shown
from drift_peft.cli import main
from drift_peft.prior.report.page import render_page, write_report
from drift_peft.prior.report.summary import prior_summary
from drift_peft.prior.report.tables import prior_notes

# Names that would break out of an element, of the script, or fill in a field of the template.
EXPERT, BASE = '</script><script>alert(1)</script><b title="x">专家 &amp; {{data}}', "./базова <модель> {{title}}"

# Uses the page as a reader does and leaves what it found in the page.
PROBE = """<script>{
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const names = () => all("#weights tbody tr").filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
const heads = all("#weights th"), found = {sorted: {}};
found.title = document.title;
found.heading = document.querySelector("h1").textContent;
found.bold = document.querySelector("h1").children.length - all("h1 > span").length;
found.plots = all("svg.plot").map((plot) => ({
  label: plot.getAttribute("aria-label"), lines: all("polyline", plot).length, points: all("circle", plot).length,
  numbers: all("text", plot).map((text) => text.textContent)}));
found.broken = all("svg.plot *").filter((node) => /NaN|Infinity|undefined/.test(node.outerHTML)).length;
const boxes = all("svg.plot").map((plot) => all("text", plot).filter((text) => !text.hasAttribute("transform"))
  .map((text) => text.getBoundingClientRect()));
found.overlapping = boxes.flatMap((list) => list.filter((a, i) => list.slice(i + 1).some((b) =>
  a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom))).length;
found.rows = all("#weights tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent));
for (const head of heads) for (const time of [1, 2]) {
  head.querySelector("button").click();
  found.sorted[head.textContent + time] = [heads.map((other) => other.getAttribute("aria-sort")), names()];
}
const filter = document.getElementById("filter");
filter.value = "1.mlp.up", filter.dispatchEvent(new Event("input"));
found.filtered = names();
const plot = document.querySelector("svg.plot"), place = plot.getBoundingClientRect();
const key = (name) => plot.dispatchEvent(new KeyboardEvent("keydown", {key: name, cancelable: true}));
const readout = () => plot.parentNode.querySelector("output").textContent;
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: place.right - 5, clientY: place.top + 50}));
found.pointed = readout();
key("ArrowLeft");
found.left = readout();
const pointer = (name, type) => plot.dispatchEvent(
  new PointerEvent(name, {pointerType: type, clientX: place.left + 50}));
pointer("pointerleave", "mouse"), found.gone = readout();
pointer("pointerdown", "touch"), pointer("pointerleave", "touch"), found.touched = readout();
found.next = document.querySelector("pre").textContent;
found.width = innerWidth;
found.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.scaled = all("svg.plot").filter((plot) => Math.abs(plot.viewBox.baseVal.width - plot.clientWidth) > 1).length;
found.background = getComputedStyle(document.body).backgroundColor;
found.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
parent.document.body.append(
  Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
}</script>"""


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "p.safetensors"
    origins = {role: {"id": name, "revision": None} for role, name in (("expert", EXPERT), ("base", BASE))}
    gone = {"not_steered": ["layers.9.<i>.weight"], "without_counterpart": {"layers.*.experts": 3}}
    return prior_summary(sample_prior(path, 3, rank="mixed", extras=True, **origins, **gone))


@pytest.fixture(scope="module")
def page(summary):
    return render_page(summary)


@pytest.fixture(scope="module")
def desktop(page, tmp_path_factory):
    return in_browser(page, PROBE, tmp_path_factory.mktemp("desktop"))


@browser
def test_it_renders(desktop, summary):
    found, console = desktop
    assert console == []
    assert found["loaded"] == [] and found["broken"] == 0 and found["bold"] == 0
    assert found["title"] == f"Δ = {shown(EXPERT)} − {shown(BASE)}" == found["heading"].replace("\u00a0", " ")
    assert (found["width"], found["wider"], found["scaled"]) == (1280, 0, 0)
    lines = {"attn": 3, "mlp": 3, "norm": 3, "bias": 3}
    norms, cosines, energies, projections, sigmas, ranks = found["plots"]
    assert (
        (norms["lines"], norms["points"]) == (len(lines), sum(lines.values())) == (cosines["lines"], cosines["points"])
    )
    assert (energies["lines"], energies["points"]) == (2, 6)  # of matrices alone
    assert projections["points"] == len(summary["projections"]) and "post_attention_layernorm" in projections["numbers"]
    assert sigmas["lines"] == ranks["lines"] == len(summary["spectra"]) == 4
    assert {"0", "1", "2", "layer"} <= set(norms["numbers"]) and {"0%", "100%"} <= set(energies["numbers"])
    assert {"1", "8", "32", "rank"} <= set(ranks["numbers"])


@browser
def test_every_weight_is_in_the_table(desktop, summary):
    found, _ = desktop
    assert [row[0] for row in found["rows"]] == list(summary["weights"])
    for (name, w), row in zip(summary["weights"].items(), found["rows"], strict=True):
        assert row[1:4] == [f"{w['relative_norm']:.3f}", f"{w['cosine']:.3f}", f"{w['energy']:.1%}"], name
        assert row[4] == str(w.get("rank", "–")) and row[6] == " × ".join(map(str, w["shape"]))


@browser
def test_sorting(desktop, summary):
    found, _ = desktop
    order = list(summary["weights"])
    columns = {"‖Δ‖/‖W‖": "relative_norm", "cosine": "cosine", "energy": "energy", "‖Δ‖": "delta_norm", "rank": "rank"}
    for head, key in [("weight", None), *columns.items()]:
        for time, direction in ((1, "ascending"), (2, "descending")):
            states, names = found["sorted"][f"{head}{time}"]
            assert sorted(states) == sorted([direction, *["none"] * 6])
            values = [order.index(n) if key is None else summary["weights"][n].get(key) for n in names]
            known = [value for value in values if value is not None]
            assert sorted(names) == sorted(order) and len(set(known)) > 1
            assert known == sorted(known, reverse=time == 2), head
            assert values[: len(known)] == known  # what has no rank comes last both ways
    assert found["filtered"] == ["layers.1.mlp.up_proj.weight"]


def test_the_next_steps_are_of_the_same_delta(summary):
    """Of Δ from a reference as well, and of the revisions that were read."""
    origins = {role: {"id": f"org/{role}", "revision": "0a1b2c"} for role in ("expert", "base", "reference")}
    told = html.unescape(render_page(summary | origins))
    assert (
        "transplant --expert org/expert@0a1b2c --base org/base@0a1b2c --reference org/reference@0a1b2c -o untrained"
    ) in told
    assert "keep make --base org/base@0a1b2c --images" in told
    assert "--reference" not in render_page(summary)


@browser
def test_numbers_are_read_out(desktop, summary):
    found, _ = desktop
    assert found["gone"] == "Touch or point at a layer to read its numbers."
    for layer, text in ((2, found["pointed"]), (1, found["left"]), (0, found["touched"])):
        rows = [row for row in summary["rows"] if row["layer"] == layer]
        told = ", ".join(f"{row['modules']} {row['relative_norm']:.3f}" for row in rows)
        assert text == f"layer {layer}: {told}"


@browser
def test_phone_and_dark(page, desktop, tmp_path):
    found, console = in_browser(page, PROBE, tmp_path, "--blink-settings=preferredColorScheme=0", width=390)
    assert console == [] and (found["width"], found["wider"], found["scaled"]) == (390, 0, 0)
    assert "-o keep.safetensors" in found["next"] and EXPERT in found["next"]
    assert found["overlapping"] == 0 == desktop[0]["overlapping"]
    light, dark = (sum(map(int, re.findall(r"\d+", f["background"])[:3])) for f in (desktop[0], found))
    assert dark < 100 < 600 < light


@browser
@pytest.mark.parametrize("only", ["", "norm|bias", "lm_head"])
def test_small_priors(only, tmp_path):
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", 1, rank=1, extras=bool(only), only=only))
    found, console = in_browser(render_page(summary), PROBE, tmp_path)
    assert console == [] and found["broken"] == 0 and len(found["rows"]) == len(summary["weights"])


@browser
def test_the_console_is_heard(page, tmp_path):
    _, console = in_browser(page.replace("plots();", "plots(); absent();"), PROBE, tmp_path)
    assert "absent is not defined" in console[0]


def test_it_needs_nothing_from_outside(page):
    markup = page.replace(json.dumps(EXPERT, ensure_ascii=False), "")
    assert not re.findall(r"https?:|//\w|@import|url\(|\bsrc=|fetch\(|XMLHttp|import\(", markup)
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in page


def test_its_numbers_are_those_of_the_prior(page, summary):
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    for (name, *values), (expected, w) in zip(data["weights"], summary["weights"].items(), strict=True):
        keys = "relative_norm", "cosine", "energy", "rank", "delta_norm", "shape"
        assert (name, values) == (expected, [w.get(key) for key in keys])
    told = json.loads(json.dumps({key: summary[key] for key in ("rows", "projections", "spectra", "rank")}))
    assert {key: data[key] for key in told} == told
    for rank, energy in summary["total"]["energy_by_rank"].items():
        assert re.search(rf"<tr><td>{rank}</td>.*>{energy:.1%}</td></tr>", page)


def test_names_stay_names(page, summary):
    assert html.escape(EXPERT) in page and html.escape(BASE) in page
    assert "<script>alert" not in page and "<b title" not in page and "<i>" not in page
    assert page.count("<script") == 2 == page.count("</script>")
    for text in (*(summary["verdict"][key] for key in ("distance", "merging", "rank", "basis")), *prior_notes(summary)):
        assert html.escape(text) in page


def test_names_of_weights_stay_names(summary):
    name = "layers.0.</script><script>alert(1)</script>"  # as in a prior from anywhere
    weights = {**summary["weights"], name: next(iter(summary["weights"].values()))}
    page = render_page({**summary, "weights": weights})
    assert page.count("<script") == 2 == page.count("</script>")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["weights"][-1][0] == name


def test_a_large_model(tmp_path):
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", layers=80, rank=128))
    assert len(summary["weights"]) == 560 and len(render_page(summary).encode()) < 500_000


@pytest.fixture
def path(tmp_path):
    sample_prior(tmp_path / "p.safetensors", layers=1, rank=4, size=BETWEEN)
    return tmp_path / "p.safetensors"


def inspect(capsys, *argv):
    """(status, stdout, stderr)"""
    status = main(["prior", "inspect", *map(str, argv)])
    return status, *capsys.readouterr()


def test_inspect_writes_both(path, capsys):
    plot, page = path.with_name("prior.png"), path.with_name("prior.html")
    argv = path, "--plot", plot, "--html", page
    status, out, err = inspect(capsys, *argv)
    assert (
        (status, err) == (0, "")
        and plot.read_bytes()[:4] == b"\x89PNG"
        and page.read_text("utf-8").endswith("</html>\n")
    )
    assert "Whether naive merging hurts is open" in " ".join(out.split()) and "rule of thumb" in out
    page.write_text("old")
    status, out, err = inspect(capsys, *argv)
    assert (status, out) == (1, "") and "prior.png exists: name another file" in err and "--overwrite" in err
    plot.unlink()
    status, _, err = inspect(capsys, *argv)  # the page's name is checked before the figure is written
    assert status == 1 and "prior.html exists" in err and not plot.exists() and page.read_text() == "old"
    status, out, _ = inspect(capsys, *argv, "--overwrite", "--json")
    assert status == 0 and plot.exists() and page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert json.loads(out)["verdict"]["level"] == "between"
    assert sorted(file.name for file in path.parent.iterdir()) == ["p.safetensors", "prior.html", "prior.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--html", "no/where/prior.html"), "there is no folder no/where"),
        (("--html", "."), "output . is a folder: name a file, such as prior.html"),
        (("--html", "p.safetensors", "--overwrite"), "p.safetensors needs a name that ends in .html"),
        (("--plot", "p.safetensors", "--overwrite"), "Format 'safetensors' is not supported"),
        (("--plot", "prior.xyz", "--html", "prior.html"), "Format 'xyz' is not supported"),
    ],
)
def test_outputs_that_cannot_be(flags, message, path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    before = path.read_bytes()
    status, out, err = inspect(capsys, "p.safetensors", *flags)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert [file.name for file in path.parent.iterdir()] == ["p.safetensors"] and path.read_bytes() == before


def test_the_pages_name_is_checked_before_the_figure_is_drawn(path, monkeypatch):
    monkeypatch.setattr("drift_peft.prior.report.page.draw_prior", lambda *args: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"prior.txt needs a name that ends in .html"):
        write_report(prior_summary(ReasoningPrior.load(path)), path.with_name("prior.png"), path.with_name("prior.txt"))


def test_without_matplotlib(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = inspect(capsys, path, "--plot", path.with_name("prior.png"))
    assert status == 1 and 'the plot needs matplotlib: pip install "drift_peft[report]"' in err
    status, *_ = inspect(capsys, path, "--html", path.with_name("prior.html"))
    assert status == 0 and path.with_name("prior.html").exists() and not path.with_name("prior.png").exists()
