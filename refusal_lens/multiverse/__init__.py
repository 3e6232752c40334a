"""The cosine and the verdict under every defensible protocol."""
