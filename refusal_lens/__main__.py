"""`python -m refusal_lens` is the command `refusal-lens`."""

import sys


def main() -> None:
    """Entry point of the command; Ctrl-C ends it with one line also while it is still importing."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        print("refusal-lens: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
