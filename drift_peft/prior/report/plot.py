"""The figure of a prior: the paper's figure 2 for its pair, and what each rank holds."""

from __future__ import annotations

import io
import textwrap

from .tables import prior_title
from .verdict import CLOSE, FAR

# Colours that colour-blind eyes can tell apart (Okabe and Ito); markers and line styles tell the same.
STYLES = {
    "attn": ("#0072b2", "o", "-"),
    "mlp": ("#d55e00", "s", "--"),
    "norm": ("#009e73", "^", "-."),
    "bias": ("#cc79a7", "v", ":"),
    "head": ("#444444", "D", "-."),
    "embed": ("#a6761d", "P", ":"),
    "other": ("#777777", "X", "-"),
}


def draw_prior(summary: dict, format: str = "png") -> bytes:
    """`prior_summary` as a figure of six plots, in a format that matplotlib writes, such as png, svg or pdf.

    It is made to be read 830 pixels wide.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: matplotlib does not write this format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "drift_peft[report]"') from error

    figure = Figure(figsize=(8.3, 9.5), layout="constrained")
    (norms, projections), (cosines, sigmas), (energies, ranks) = figure.subplots(3, 2)
    _draw_layers(summary, norms, cosines, energies)
    _draw_projections(summary, projections)
    _draw_spectra(summary, sigmas, ranks)
    for axes in figure.axes:
        axes.title.set_size(9)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    kinds = [group["modules"] for group in summary["kinds"]]
    handles = [norms.plot([], [], **_style(kind), label=kind)[0] for kind in kinds]
    norms.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=8)  # norms are drawn from 0
    figure.suptitle(textwrap.fill(prior_title(summary), 95), fontsize=10, parse_math=False)
    verdict = summary["verdict"]
    words = textwrap.fill(f"{verdict['distance']} {verdict['merging']}", 110)
    figure.supxlabel(words, fontsize=9, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format=format, dpi=160)
    return file.getvalue()


def _style(kind: str) -> dict:
    color, marker, line = STYLES[kind]
    return {"color": color, "marker": marker, "ls": line, "markersize": 4}


def _draw_layers(summary: dict, norms, cosines, energies) -> None:
    norms.set_title("relative norm ‖Δ‖/‖W‖ by layer")
    cosines.set_title(f"cosine of {summary['cosine_of']} by layer, mean and range")
    energies.set_title(f"captured energy at rank {summary['rank']} by layer")
    by_kind: dict[str, list[dict]] = {}
    for row in summary["rows"]:
        if row["layer"] is not None:
            by_kind.setdefault(row["modules"], []).append(row)
    for kind, rows in by_kind.items():
        layers, mean, *span = (
            [row[key] for row in rows] for key in ("layer", "mean_cosine", "cosine", "highest_cosine")
        )
        norms.plot(layers, [row["relative_norm"] for row in rows], **_style(kind))
        cosines.plot(layers, mean, **_style(kind))
        cosines.fill_between(layers, *span, color=STYLES[kind][0], alpha=0.2, lw=0)
        if rows[0]["energy_by_rank"]:  # vectors are kept whole
            energies.plot(layers, [row["energy"] for row in rows], **_style(kind))
    for level in (CLOSE, FAR):
        cosines.axhline(level, color="gray", ls=":", lw=1.5)
    cosines.set_ylim(min(FAR - 0.05, *(row["cosine"] for row in summary["rows"])) - 0.01, 1.01)
    _from_zero(norms, [row["relative_norm"] for rows in by_kind.values() for row in rows])
    _percent(energies)
    layers = sorted({row["layer"] for rows in by_kind.values() for row in rows})
    for axes in (norms, cosines, energies):
        axes.set_xticks(layers[:: max(1, len(layers) // 8)])
        axes.set_xlabel("layer" if layers else "the prior holds nothing inside the layers")
    cosines.set_xlabel(f"{cosines.get_xlabel()} (dotted: close above {CLOSE:.2f}, far below {FAR:.2f})")


def _draw_projections(summary: dict, axes) -> None:
    axes.set_title("relative norm by projection, range over the layers")
    groups = summary["projections"]
    for place, group in enumerate(groups):
        if group["relative_norm"] is not None:
            color, marker, _ = STYLES[group["modules"]]
            axes.plot([place, place], group["relative_norm_range"], color=color, lw=6, alpha=0.3)
            axes.plot(place, group["relative_norm"], color=color, marker=marker)
    axes.set_xticks(range(len(groups)), [group["projection"] for group in groups], rotation=40, ha="right")
    _from_zero(axes, [group["relative_norm_range"][1] for group in groups if group["relative_norm_range"]])


def _draw_spectra(summary: dict, sigmas, ranks) -> None:
    sigmas.set_title("singular values σᵢ/‖Δ‖, RMS over the weights")
    ranks.set_title("captured energy by rank, range over the weights")
    for spectrum in summary["spectra"]:
        color, marker, line = STYLES[spectrum["modules"]]
        held = range(1, len(spectrum["energy"]) + 1)
        style = {"color": color, "ls": line, "lw": 2, "marker": marker if len(held) == 1 else None}
        sigmas.plot(held[: len(spectrum["sigma"])], spectrum["sigma"], **style)
        ranks.plot(held, spectrum["energy"], **style)
        ranks.fill_between(held, spectrum["least"], spectrum["most"], color=color, alpha=0.2, lw=0)
    highest = max((len(spectrum["energy"]) for spectrum in summary["spectra"]), default=0)
    for axes in (sigmas, ranks):
        axes.set_xlabel("rank" if highest else "the prior holds vectors only")
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**i for i in range(highest.bit_length())])
        axes.xaxis.set_major_formatter("{x:.0f}")
    sigmas.set_yscale("log")
    _percent(ranks)


def _from_zero(axes, values: list[float | None]) -> None:
    axes.set_ylim(0, 1.08 * max((value for value in values if value is not None), default=1))


def _percent(axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
