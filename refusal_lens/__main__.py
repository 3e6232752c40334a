"""`python -m refusal_lens` is the command `refusal-lens`."""

from .cli import main

if __name__ == "__main__":
    main()
