"""Settings of the tests of experiments."""

from tests._compile import compile_fast as compile_fast
