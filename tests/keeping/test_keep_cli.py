"""drift-peft keep: make, inspect, push, and the contact sheet."""

import base64
import io
import json
import re
from html import unescape

import pytest
import torch
from command import entry, run
from hub import Hub
from keep_sets import make
from PIL import Image

from drift_peft import KeepSet
from drift_peft.keeping.page import render_page
from drift_peft.keeping.summary import entropy

FLAGS = ("--samples", 20, "--max-new-tokens", 8, "--top-k", 5, "--batch-size", 4)


def test_make(folder, capsys, tmp_path):
    where = "--base", folder / "base", "--images", folder / "pictures", "-o", tmp_path / "k.safetensors"
    capsys.readouterr()
    assert entry.load()([*map(str, ("keep", "make", *where, *FLAGS, "--json"))]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert "keep set: 100%" in err and "20/20" in err
    assert (tmp_path / "k.safetensors").read_bytes() == (folder / "keep.safetensors").read_bytes()
    assert summary["total"]["samples"] == 20 and summary["sha256"] == KeepSet.load(tmp_path / "k.safetensors").sha256
    status, _, err = run(capsys, "keep", "make", *where)
    assert status == 1 and re.fullmatch(r"drift-peft: error: output \S+ exists: name another file, .*\n", err)
    status, _, err = run(capsys, "keep", "make", *where, "--overwrite", "--top-k", 99)
    assert status == 1 and "top_k=99 (--top-k) is larger than the vocabulary" in err and err.count("\n") == 1
    status, _, err = run(capsys, "keep", "make", *where, "--api-key-env", "NO_SUCH_KEY")
    assert status == 1 and "--api-key-env NO_SUCH_KEY: there is no such environment variable, or it is empty" in err


def test_inspect(folder, capsys, tmp_path):
    file = folder / "keep.safetensors"
    status, out, _ = run(capsys, "keep", "inspect", file, "--json")
    summary, keep_set = json.loads(out), KeepSet.load(file)
    assert status == 0 and (summary["images"], summary["questions"], summary["k"]) == (7, 20, 5)
    assert {kind: row["samples"] for kind, row in summary["kinds"].items()} == keep_set.kinds
    reading = [sample for sample in keep_set if sample.kind == "read"]
    lengths = [len(sample.tokens) for sample in reading]
    row = summary["kinds"]["read"]
    assert row["longest"] == max(lengths) and row["mean_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    assert row["cut"] == lengths.count(8)
    p = torch.cat([sample.top_logprobs for sample in reading]).double().exp()
    rest = 1 - p.sum(-1, keepdim=True)
    assert row["captured"] == pytest.approx(p.sum(-1).mean().item())
    assert row["entropy"] == pytest.approx(torch.special.entr(torch.cat([p, rest], -1)).sum(-1).mean().item())
    status, out, _ = run(capsys, "keep", "inspect", file)
    assert status == 0 and "20 answers of" in out and "read" in out and f"{summary['total']['captured']:.1%}" in out
    status, _, err = run(capsys, "keep", "inspect", folder / "base" / "model.safetensors")
    assert status == 1 and "is a safetensors file but no keep set" in err


def test_entropy_of_a_known_distribution():
    p = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    expected = [1.5 * torch.log(torch.tensor(2.0)), 0.0, torch.log(torch.tensor(2.0))]
    torch.testing.assert_close(entropy(p.clamp_min(1e-300).log()), torch.tensor(expected).double())


def test_contact_sheet(folder, capsys, tmp_path):
    page = tmp_path / "keep.html"
    status, _, _ = run(capsys, "keep", "inspect", folder / "keep.safetensors", "--html", page)
    html, keep_set = page.read_text(encoding="utf-8"), KeepSet.load(folder / "keep.safetensors")
    assert status == 0 and not re.search(r"""(?:src|href)=["'](?!data:|#)""", html) and "{{" not in html
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(pictures) == 20
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size in {(16, 16), (24, 16), (16, 24)}
    for name, expected in (("question", "question"), ("answer", "answer")):
        shown = [unescape(text) for text in re.findall(rf'<p class="{name}">(.*?)</p>', html, re.S)]
        assert sorted(shown) == sorted(getattr(sample, expected) for sample in keep_set)
    status, _, err = run(capsys, "keep", "inspect", folder / "keep.safetensors", "--html", page)
    assert status == 1 and "keep.html exists" in err
    status, _, err = run(capsys, "keep", "inspect", folder / "keep.safetensors", "--html", tmp_path / "keep.pdf")
    assert status == 1 and "needs a name that ends in .html" in err


def test_words_stay_words_on_the_page(folder):
    asked = [("<b>kind</b>", "<script>alert(1)</script> {{rows}}")]
    keep_set = make(folder, "page.safetensors", questions=asked, samples=3, overwrite=True)
    html = render_page(keep_set)
    assert "<script>" not in html and "<b>" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; {{rows}}") == 3


def test_push(folder, capsys, tmp_path, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        status, out, _ = run(capsys, "keep", "push", folder / "keep.safetensors", "someone/keep", "--json")
        assert status == 0 and json.loads(out)["repository"] == "someone/keep"
        status, out, _ = run(capsys, "keep", "push", folder / "keep.safetensors", "someone/keep", "--revision", "exp1")
        assert status == 0 and 'KeepSet.load("someone/keep@exp1")' in out
        status, out, _ = run(capsys, "keep", "inspect", "someone/keep", "--json")
    assert status == 0 and json.loads(out)["sha256"] == KeepSet.load(folder / "keep.safetensors").sha256
