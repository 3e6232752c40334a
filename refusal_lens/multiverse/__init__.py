"""The same question under every defensible protocol."""
