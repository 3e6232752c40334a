"""The command line: one class per command."""
