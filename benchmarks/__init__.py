"""Races against peer libraries; run as ``python -m benchmarks.<name>``."""
