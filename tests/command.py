"""The command line through its entry point."""

from importlib.metadata import entry_points

(entry,) = entry_points(group="console_scripts", name="drift-peft")


def run(capsys, *argv):
    """(status, stdout, stderr without progress bars)"""
    try:
        status = entry.load()([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines(keepends=True) if line.startswith("drift-peft:"))
