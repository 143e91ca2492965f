"""A terminal of some encoding, for what runs in this process."""

import contextlib
import io
import sys


@contextlib.contextmanager
def terminal(monkeypatch, encoding):
    """Yields a function that says what was printed so far: stdout and stderr, as such a terminal shows them."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        yield lambda: tuple(stream.buffer.getvalue().decode(encoding) for stream in streams)
