"""What is told of a prior: the numbers against the file, the verdict against its thresholds, the table, the figure."""

import io
import json
import math
from html import escape

import pytest
import torch
from dense_prior import GATES_FROM
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sample_prior import BETWEEN, CLOSE_PAIR, FAR_PAIR, sample_prior

from drift_peft import ReasoningPrior, build_prior
from drift_peft.demo.compare import EXPERT, VLM
from drift_peft.prior.prior import write_gated
from drift_peft.prior.report.page import render_page
from drift_peft.prior.report.plot import draw_prior
from drift_peft.prior.report.summary import prior_summary, projection
from drift_peft.prior.report.tables import prior_notes, prior_rows, prior_table, prior_title
from drift_peft.prior.report.verdict import BASIS, CLOSE, FAR, verdict

LAYERS = 5


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """With vectors, head, embedding and ranks that differ."""
    return sample_prior(tmp_path_factory.mktemp("report") / "p.safetensors", LAYERS, rank="mixed", extras=True)


def printed(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def energy(prior, names, rank):
    """ΣS² / Σ‖Δ‖² of these matrices at a rank, in plain Python."""
    held = math.fsum(s**2 for name in names for s in prior[name].S[:rank].tolist())
    return held / math.fsum(prior[name].delta_norm ** 2 for name in names)


def test_weights_are_those_of_the_header(prior):
    summary = prior_summary(prior)
    assert list(summary["weights"]) == list(prior)
    for name, stats in prior.metadata["weights"].items():
        told = summary["weights"][name]
        assert {key: told[key] for key in stats} == stats
        assert told["relative_norm"] == pytest.approx(stats["delta_norm"] / stats["base_norm"], rel=1e-12)
    assert json.loads(json.dumps(summary, allow_nan=False))["sha256"] == prior.sha256
    assert {key: summary[key] for key in ("expert", "base", "seed", "modules")} == {
        key: prior.metadata[key] for key in ("expert", "base", "seed", "modules")
    }


def test_groups_against_the_file(prior):
    summary = prior_summary(prior)
    kinds = {"attn": ".self_attn.", "mlp": ".mlp.", "norm": "layernorm"}
    for kind, part in kinds.items():
        names = [name for name in prior if name.startswith("layers.3.") and part in name and "bias" not in name]
        (row,) = (row for row in summary["rows"] if (row["layer"], row["modules"]) == (3, kind))
        weights = [prior[name] for name in names]
        delta, base = (math.fsum(getattr(w, n) ** 2 for w in weights) for n in ("delta_norm", "base_norm"))
        cosines = sorted(w.cosine for w in weights)
        assert row["weights"] == len(names) == {"attn": 4, "mlp": 3, "norm": 2}[kind]
        assert row["relative_norm"] == pytest.approx(math.sqrt(delta / base), rel=1e-9)
        assert (row["cosine"], row["highest_cosine"]) == (cosines[0], cosines[-1])
        assert row["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
        if kind == "norm":
            assert row["energy"] == pytest.approx(1) and row["energy_by_rank"] == {}
        else:
            assert row["energy"] == pytest.approx(energy(prior, names, None), rel=1e-5)
            assert row["energy_by_rank"][16] == pytest.approx(energy(prior, names, 16), rel=1e-9)
    q = [w["relative_norm"] for name, w in summary["weights"].items() if name.endswith("q_proj.weight")]
    (group,) = (group for group in summary["projections"] if group["projection"] == "q_proj")
    assert group["weights"] == LAYERS and group["relative_norm_range"] == [min(q), max(q)]


def test_what_is_in_no_layer(prior):
    summary = prior_summary(prior)
    assert [(row["layer"], row["modules"]) for row in summary["rows"]][-3:] == [
        (None, k) for k in ("embed", "head", "norm")
    ]
    assert [row["layer"] for row in summary["rows"][:-3]] == [layer for layer in range(LAYERS) for _ in range(4)]
    names = {group["projection"] for group in summary["projections"]}
    assert names >= {"q_proj", "q_proj.bias", "up_proj", "input_layernorm", "embed_tokens", "norm", "lm_head"}
    assert projection("layers.3.self_attn.q_norm.weight") == "q_norm"


def test_rank(prior):
    whole, low = prior_summary(prior), prior_summary(prior, 12)
    matrices = [name for name in prior if len(prior.metadata["weights"][name]["shape"]) == 2]
    assert low["rank"] == 12 and whole["rank"] == max(len(prior[name].S) for name in matrices)
    assert whole["total"]["energy"] > low["total"]["energy"]
    for name in matrices:
        assert low["weights"][name]["energy"] == pytest.approx(energy(prior, [name], 12), rel=1e-9)
    assert 12 in low["total"]["energy_by_rank"] and 12 not in whole["total"]["energy_by_rank"]
    assert low["total"]["energy_by_rank"][12] == pytest.approx(energy(prior, matrices, 12), rel=1e-9)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
            prior_summary(prior, rank)


@pytest.mark.parametrize("rank, expected", [(1, [1]), (4, [1, 2, 4]), (20, [2, 4, 8, 16, 20]), (64, [8, 16, 32, 64])])
def test_which_ranks_are_told(rank, expected, tmp_path):
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", layers=1, rank=rank))
    assert list(summary["total"]["energy_by_rank"]) == expected


def test_spectrum(prior):
    spectra = {spectrum["modules"]: spectrum for spectrum in prior_summary(prior)["spectra"]}
    assert spectra.keys() == {"attn", "mlp", "embed", "head"}
    names = [name for name in prior if ".mlp." in name]
    mlp, ranks = spectra["mlp"], [len(prior[name].S) for name in names]
    assert mlp["weights"] == len(names) and len(mlp["energy"]) == max(ranks)
    assert len(mlp["sigma"]) == min(ranks)  # beyond, some of the singular values are unknown and not zero
    for k in (1, 9, max(ranks)):
        each = [energy(prior, [name], k) for name in names]
        assert mlp["energy"][k - 1] == pytest.approx(energy(prior, names, k), rel=1e-9)
        assert (mlp["least"][k - 1], mlp["most"][k - 1]) == pytest.approx((min(each), max(each)), rel=1e-9)
    assert mlp["sigma"][4] ** 2 == pytest.approx(mlp["energy"][4] - mlp["energy"][3], rel=1e-9)


def test_a_base_of_zeros_has_no_relative_norm(tmp_path):
    prior = sample_prior(tmp_path / "p.safetensors", layers=1, extras=True)
    prior.metadata["weights"]["layers.0.self_attn.q_proj.bias"]["base_norm"] = 0.0
    summary = prior_summary(prior)
    assert summary["weights"]["layers.0.self_attn.q_proj.bias"]["relative_norm"] is None
    assert "–" in printed(prior_table(summary)) and draw_prior(summary)  # of one layer too


@pytest.mark.parametrize("size, level", [(CLOSE_PAIR, "close"), (BETWEEN, "between"), (FAR_PAIR, "far")])
def test_verdict(size, level, tmp_path):
    prior = sample_prior(tmp_path / "p.safetensors", layers=4, size=size, extras=True)
    judged = {name: prior[name].cosine for name in prior if "_proj.weight" in name}
    told = prior_summary(prior)["verdict"]
    assert told["level"] == level
    assert told["mean_cosine"] == pytest.approx(sum(judged.values()) / len(judged), rel=1e-12)
    lowest = min(judged, key=judged.get)
    assert f"{judged[lowest]:.3f} in the most distant, {lowest.removesuffix('.weight')}." in told["distance"]
    assert f"{told['mean_cosine']:.3f} on average over 28 attention and MLP matrices" in told["distance"]
    assert {"close": "likely to work", "between": "is open", "far": "likely to hurt"}[level] in told["merging"]
    energies = prior_summary(prior)["total"]["energy_by_rank"]
    assert all(f"{energies[rank]:.1%} at rank {rank}" in told["rank"] for rank in (8, 16, 32, 64))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_verdict_follows_its_thresholds(cosines):
    weights = {f"layers.{i}.mlp.up_proj.weight": {"cosine": cosine} for i, cosine in enumerate(cosines)}
    told = verdict({**weights, "norm.weight": {"cosine": 1.0}, "lm_head.weight": {"cosine": 1.0}}, {})
    mean = math.fsum(cosines) / len(cosines)
    assert told["level"] == ("close" if mean >= CLOSE else "between" if mean >= FAR else "far")


def test_the_verdict_tells_where_its_thresholds_come_from():
    assert f"{CLOSE:.2f} or more" in BASIS and f"below {FAR:.2f}" in BASIS
    assert "rule of thumb" in BASIS and "thresholds are ours" in BASIS and "2510.15050" in BASIS


def test_the_demo_pair_lies_where_the_verdict_says(tmp_path):
    prior = build_prior(EXPERT, VLM, tmp_path / "p.safetensors", rank=1, progress=False)
    told = prior_summary(prior)["verdict"]
    assert told["level"] == "between" and f"demo, at {told['mean_cosine']:.2f}" in BASIS


def test_nothing_to_judge(tmp_path):
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", 2, extras=True, only="lm_head|embed"))
    assert summary["verdict"]["level"] is None and summary["verdict"]["mean_cosine"] is None
    assert "no attention or MLP matrix" in summary["verdict"]["distance"]
    assert "no telling" in summary["verdict"]["merging"] and "at rank 64" in summary["verdict"]["rank"]


def test_vectors_only(tmp_path):
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", 2, extras=True, only="norm|bias"))
    assert summary["rank"] == 0 and summary["spectra"] == [] and "vectors only" in summary["verdict"]["rank"]
    assert "k=0" not in printed(prior_table(summary)) and "rank 0" not in render_page(summary)
    assert draw_prior(summary)[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_combined_prior(tmp_path):
    one, two = (
        sample_prior(tmp_path / f"{i}.safetensors", 2, rank, size) for i, rank, size in ((1, 8, 0.7), (2, 6, 0.2))
    )
    ReasoningPrior.combine([(one, 0.7), (two, 0.3)], tmp_path / "c.safetensors")
    summary = prior_summary(ReasoningPrior.load(tmp_path / "c.safetensors"))
    assert (
        "0.7·" in prior_title(summary) and "At least one expert is far from the base" in summary["verdict"]["distance"]
    )
    assert "0.7·" in printed(prior_table(summary))


def test_a_combined_prior_is_not_judged_by_its_experts(tmp_path):
    """A coefficient moves Δ and no expert, so that their cosines say nothing of merging the sum."""
    one = sample_prior(tmp_path / "p.safetensors", 2, size=CLOSE_PAIR)
    combined = ReasoningPrior.combine([(one, 20)], tmp_path / "c.safetensors")
    alone, summary = prior_summary(one), prior_summary(combined)
    assert "likely to work" in alone["verdict"]["merging"] and alone["verdict"]["title"] == "Close"
    assert summary["total"]["relative_norm"] == pytest.approx(20 * alone["total"]["relative_norm"], rel=1e-2)
    told = summary["verdict"]
    assert told["merging"].startswith("Whether merging their sum hurts is open") and told["title"] == "Experts close"
    for shown, named in ((alone, "of expert and base"), (summary, "of farthest expert and base")):
        assert f"cosine {named}: mean and lowest" in " ".join(printed(prior_table(shown)).split())
        assert f"mean cosine {named}" in render_page(shown) and f"cosine {named}" in draw_prior(shown, "svg").decode()
    gates = {name: torch.full((len(one[name].S),), 0.5) for name in one}
    products = {name: torch.zeros(len(one[name].S)) for name in one}
    gated = prior_summary(write_gated(combined, gates, products, tmp_path / "g.safetensors", GATES_FROM))
    assert gated["cosine_of"] == "base and base + Δ"
    assert gated["verdict"]["distance"].startswith("The two models are")


def test_a_prior_with_coefficient_1_is_judged_as_itself(tmp_path):
    """As a gated one is once it was truncated; a sum of several stays one."""
    one, two = (sample_prior(tmp_path / f"{size}.safetensors", 2, size=size) for size in (CLOSE_PAIR, FAR_PAIR))
    half = {name: torch.full((len(one[name].S),), 0.5) for name in one}
    gated = write_gated(one, half, {name: torch.zeros(len(S)) for name, S in half.items()}, tmp_path / "g", GATES_FROM)
    both = ReasoningPrior.combine([(one, 0.5), (two, 0.5)], tmp_path / "both")
    for parent, title, words in (
        (one, "Close", "expert and base"),
        (gated, "Close", "base and base + Δ"),
        (both, "An expert far apart", "farthest expert and base"),
    ):
        same = parent
        for turn in range(2):
            same = ReasoningPrior.combine([(same, 1.0)], tmp_path / f"{parent.path.name}{turn}", rank=4 - turn)
            summary = prior_summary(same)
            assert summary["cosine_of"] == words and summary["verdict"]["title"] == title
            alone = prior_summary(parent)["verdict"]
            assert all(summary["verdict"][key] == alone[key] for key in ("distance", "merging"))
            assert f"that of {words}." in same.model_card().text
    small = gated.truncate(4, tmp_path / "small")
    assert prior_summary(small)["verdict"]["distance"].startswith("The two models are close")


def test_table(prior):
    summary = prior_summary(prior)
    lines = printed(prior_table(summary)).splitlines()
    assert max(map(len, lines)) <= 80
    head = next(line for line in lines if "layer" in line)
    assert all(f"k={k}" in head for k in (8, 16, 32, summary["rank"]))
    rows = [line.split() for line in lines]
    row = next(r for r in summary["rows"] if (r["layer"], r["modules"]) == (2, "attn"))
    expected = [f"{row[key]:.3f}" for key in ("relative_norm", "mean_cosine", "cosine")]
    expected += [f"{row['energy_by_rank'][k]:.1%}" for k in (8, 16, 32)] + [f"{row['energy']:.1%}"]
    assert ["2", "attn", "4", *expected] in rows
    assert ["–", "norm", "1"] in [row[:3] for row in rows] and "all" in [row[0] for row in rows if row]


def test_table_of_a_gated_prior_that_holds_all(prior):
    """Eleven columns, of which none is cut at 80 signs."""
    summary = prior_summary(prior)
    whole = {"energy": 1.0, "energy_by_rank": dict.fromkeys(summary["total"]["energy_by_rank"], 1.0), "taken": 1.0}
    rows = [{**row, **whole} for row in summary["rows"]]
    gates = [{"modules": "attn", "least": [0.0], "most": [1.0]}]
    lines = printed(prior_table({**summary, "rows": rows, "total": {**summary["total"], **whole}, "gates": gates}))
    assert lines.count("100%") > 10 and "…" not in lines and "‖Δ‖/‖W‖" in lines and "lowest" in lines


def test_gates_beyond_the_smallest_rank_are_told(tmp_path):
    prior = sample_prior(tmp_path / "p.safetensors", 2, "mixed", only="attn")
    *others, longest = sorted(prior, key=lambda name: len(prior[name].S))
    assert len(prior[longest].S) > len(prior[others[0]].S)
    gates = {name: torch.full((len(prior[name].S),), 0.5) for name in prior}
    gates[longest][-1], gates[others[0]][0] = 0.01, 0.99
    products = {name: torch.zeros(len(prior[name].S)) for name in prior}
    summary = prior_summary(write_gated(prior, gates, products, tmp_path / "g.safetensors", GATES_FROM))
    assert "the gates of its directions run from 0.01 to 0.99" in prior_notes(summary)[0]
    (kind,) = summary["gates"]
    for i in range(len(prior[longest].S)):
        those = [row[i].item() for row in gates.values() if i < len(row)]
        assert kind["mean"][i] == pytest.approx(sum(those) / len(those), abs=1e-4)
        assert (kind["least"][i], kind["most"][i]) == pytest.approx((min(those), max(those)), abs=1e-4)
    assert len(kind["mean"]) == len(kind["least"]) == len(kind["most"]) == len(prior[longest].S)


def test_notes(tmp_path):
    gone = [f"layers.{i}.mlp.up_proj.weight" for i in range(30, 35)]
    experts = {"layers.*.mlp.experts.gate_up_proj": 24}
    path = tmp_path / "p.safetensors"
    prior = sample_prior(path, 2, "mixed", extras=True, not_steered=gone, without_counterpart=experts)
    prior.metadata["weights"]["lm_head.weight"]["rows"] = 480
    notes = " ".join(prior_notes(prior_summary(prior)))
    assert "30.mlp.up_proj.weight" in notes and "and 2 more" in notes
    assert "layers.*.mlp.experts.gate_up_proj (24)" in notes and "480 of the 512 rows of lm_head.weight" in notes
    ranks = [len(prior[name].S) for name in prior if "rank" in prior.metadata["weights"][name]]
    assert f"from {min(ranks)} to {max(ranks)}" in notes
    assert prior_notes(prior_summary(sample_prior(path, 2))) == []


def test_names_are_no_markup(tmp_path):
    names = {"expert": "/моделі/[red]эксперт[bold] :smile:", "base": "基础[link]$x$"}
    origins = {role: {"id": name, "revision": None} for role, name in names.items()}
    summary = prior_summary(sample_prior(tmp_path / "p.safetensors", 1, **origins))
    assert "Δ = [red]эксперт[bold] :smile: − 基础[link]$x$" in printed(prior_table(summary), width=200)
    with pytest.warns(UserWarning, match="missing from font"):  # matplotlib's font has no Chinese
        assert draw_prior(summary)[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_notebook_shows_the_verdict_and_the_table(prior, tmp_path):
    html, summary = prior._repr_html_(), prior_summary(prior)
    for words in (summary["verdict"]["distance"], summary["verdict"]["merging"], prior_title(summary)):
        assert escape(words) in html
    rows = [row.split("<td>")[1:] for row in html.partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")[1:]]
    told = prior_rows(summary)[1]
    assert [[cell.split("<")[0] for cell in row] for row in rows] == told and len(told) > LAYERS
    named = sample_prior(tmp_path / "p.safetensors", 1, expert={"id": "<b>x<i>", "revision": None})
    assert "<b>x<i>" not in named._repr_html_() and escape("<b>x<i>") in named._repr_html_()


def test_figure(prior, tmp_path):
    summary = prior_summary(prior)
    svg = draw_prior(summary, "svg")
    assert svg.startswith(b"<?xml") and svg.count(b'<g id="axes_') == 6
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        draw_prior(summary, "xyz")


def test_spectrum_of_whole_matrices_has_no_cut(tmp_path):
    prior = sample_prior(tmp_path / "p.safetensors", layers=1, rank=200)  # of which no matrix has as many directions
    for spectrum in prior_summary(prior)["spectra"]:
        assert len(spectrum["sigma"]) == len(spectrum["energy"]) == 128
        assert spectrum["energy"][-1] == pytest.approx(1, rel=1e-6)
        assert torch.tensor(spectrum["sigma"]).diff().max() <= 0
