"""`python -m refusal_lens` is the command `refusal-lens`."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `refusal-lens`; on Ctrl-C, also while it is still importing, status 130."""
    try:
        from .cli.main import main as run

        run(arguments)
    except KeyboardInterrupt:
        print("refusal-lens: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
