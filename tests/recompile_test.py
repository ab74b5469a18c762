"""The helpers that other tests trust see what they are there to see."""

import jax
import jax.numpy as jnp
import pytest

from tests._recompile import log_compilations, no_recompilation, quick_jit


def test_compilations_are_seen_and_calls_are_not():
  double = jax.jit(lambda x: 2 * x)
  first, second = jnp.ones(3), jnp.zeros(3)
  longer, longest = jnp.ones(4), jnp.ones(5)
  double(first)
  with no_recompilation():
    double(second)
  with log_compilations() as names:
    double(longer)
  assert names == ["jit(<lambda>)"]
  with (
    pytest.raises(AssertionError, match=r"compiled again: jit\(<lambda>\)$"),
    no_recompilation(),
  ):
    double(longest)


def test_quick_jit_computes_the_same():
  x = jnp.linspace(-3, 3, 50)
  fn = lambda x: jax.nn.softmax(jnp.outer(x, x))  # noqa: E731
  assert jnp.allclose(quick_jit(fn)(x), fn(x))
