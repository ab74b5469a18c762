"""What holds for the solver on every regression problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import newton
from tests._recompile import no_recompilation
from tests.conformance._regression import MEMBERS, minimum
from tests.regression import _sampling


@pytest.fixture(params=MEMBERS, ids=lambda m: m.name)
def member(request):
  return request.param


def test_vmap_over_starts_is_a_loop(member):
  found, data = minimum(member)
  # Before rounding rules: there the paths part.
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-6)
  starts = [_sampling.near(found.x, 0.05, seed) for seed in range(8)]

  def run(x):
    return newton.minimize(member.problem, x, data, config=config)

  together = jax.vmap(run)(jnp.stack(starts))
  run(starts[0])
  with no_recompilation():
    alone = [run(x) for x in starts]
  assert [a.num_steps for a in alone] == together.num_steps.tolist()
  x = [np.asarray(a.x) for a in alone]
  np.testing.assert_allclose(x, together.x, rtol=0, atol=1e-12)


def test_float32_stays_float32(member):
  exact, data = minimum(member)
  start = _sampling.near(exact.x, 0.05)
  to32 = lambda z: z.astype("float32")  # noqa: E731
  data, start = jax.tree.map(to32, data), to32(start)
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-4)
  found = newton.minimize(member.problem, start, data, config=config)
  assert found.x.dtype == found.loss.dtype == jnp.float32
  assert found.reason in (1, 2, 3)
  assert found.loss <= exact.loss * (1 + 1e-3) + 1e-7
