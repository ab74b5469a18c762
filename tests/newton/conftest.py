"""Settings of these tests."""

from tests._compile import compile_fast as compile_fast
