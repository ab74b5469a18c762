"""Experiments that the tests run: each takes seconds and claims nothing."""
