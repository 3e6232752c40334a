"""The one error of our own: a mistake in what was handed over."""


class InputError(ValueError):
    """Something handed to us can't be used as it is.

    Its message says what was wrong, where, and what to do, in one line. The command line prints that
    line alone and exits with status 2; every other exception is a fault of ours and keeps its
    traceback.

    What a message quotes of a stranger's file stays harmless: line breaks and tabs become spaces,
    and whatever else a terminal would not show but obey is written out (`\\x1b`).
    """

    def __init__(self, message: str):
        super().__init__("".join(map(_shown, message)))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\r\n\t" else ascii(character)[1:-1]
