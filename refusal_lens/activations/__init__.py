"""Tokens to the residual stream of every layer."""
