"""The whole experiment in one call: configuration, evidence, verdict, results."""
