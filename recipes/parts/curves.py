"""How a run went, drawn from Trainer's log history: loss, and where the adapter stands against the prior."""

from pathlib import Path

from matplotlib.figure import Figure

from drift_peft.atomic import write

PANELS = {  # title -> what it shows, by its name in the logs
    "loss": ("loss", "eval_loss"),
    "of Δ absorbed by the adapter": ("drift/absorbed",),
    "cosine of adapter and Δ": ("drift/alignment",),
    "last step: cosine of gradient and direction": ("drift/gradient_cosine",),
    "last step: bias over gradient": ("drift/bias_ratio",),
    "kept: nats from the VLM per answer token": ("drift/keep_kl",),
    "learning rate": ("learning_rate",),
}
SHARES = ("drift/absorbed", "drift/alignment")  # drawn from 0 to 1, so that runs compare and a small share looks small
COLUMNS = 2


def plot_run(history: list[dict], output: Path) -> None:
    """Draw `trainer.state.log_history` into a file, such as telemetry.png; what was not logged is left out.

    Kinds of modules (`drift/absorbed/attn`) are thin lines beside their total.
    """
    names = {name for entry in history for name in entry}
    shown = {title: keys for title, keys in PANELS.items() if names.intersection(keys)}
    rows = max(1, -(-len(shown) // COLUMNS))
    figure = Figure(figsize=(9, 2.8 * rows), layout="constrained")  # inches: legible at the width of a web page
    if not shown:
        figure.suptitle("Nothing was logged: logging_steps is more than there were steps.")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for (title, keys), panel in zip(shown.items(), axes, strict=False):
        drawn = sorted(n for n in names if n in keys or n.rpartition("/")[0] in keys)
        for name in drawn:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            total = name in keys
            panel.plot(
                *zip(*points, strict=True),
                label=name.removeprefix("drift/"),
                lw=2 if total else 1,
                alpha=1 if total else 0.6,
            )
        if drawn[0] in SHARES:
            low, high = panel.get_ylim()
            panel.set_ylim(min(0, low), max(1, high))
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
        if len(drawn) > 1:
            panel.legend(frameon=False)
    for panel in list(axes):
        panel.set_visible(False)
    write(output, lambda unfinished: figure.savefig(unfinished, format=output.suffix[1:], dpi=160))
