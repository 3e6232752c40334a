"""The one error of our own: a mistake in what was handed over."""


class InputError(ValueError):
    """Something handed to us can't be used as it is.

    Its message says what was wrong, where, and what to do, in one line. The command line prints that
    line alone and exits with status 2; every other exception is a fault of ours and keeps its
    traceback.
    """
