"""What is wrong with a sample that cannot be used."""


class BadSample(ValueError):
    """A sample that cannot be used, in one sentence; `reason` is the kind of fault, under which it is counted."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(printable(sentence))
        self.reason = reason


def printable(text: str) -> str:
    """A text of others, without what a terminal obeys or cannot show."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
