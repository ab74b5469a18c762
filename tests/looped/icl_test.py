"""Tasks of in-context regression: distribution, labels, refused inputs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.looped import sample_icl_task

pytestmark = pytest.mark.any_x64


def test_labels_are_those_of_the_task():
  task = sample_icl_task(
    jax.random.key(0), num_examples=7, dim=3, num_queries=4
  )
  assert (task.x.shape, task.queries.shape) == ((7, 3), (4, 3))
  assert task.y.dtype == jnp.float32
  np.testing.assert_allclose(task.y, task.x @ task.w, rtol=0, atol=1e-6)
  np.testing.assert_allclose(
    task.targets, task.queries @ task.w, rtol=0, atol=1e-6
  )


def test_moments():
  sigma = jnp.array([[2.0, 0.9], [0.9, 0.5]], jnp.float32)

  def draw(rng):
    return sample_icl_task(
      rng, num_examples=4, dim=2, num_queries=4, covariance=sigma, noise=0.5
    )

  tasks = jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000))
  for x in (tasks.x, tasks.queries):
    got = np.cov(np.asarray(x).reshape(-1, 2).T)
    # 16000 draws: 5 standard errors of a second moment are 5 * 2 * sqrt(2/N).
    np.testing.assert_allclose(got, sigma, rtol=0, atol=0.12)
  np.testing.assert_allclose(np.cov(tasks.w.T), np.eye(2), rtol=0, atol=0.12)
  error = tasks.y - jnp.einsum("bnd,bd->bn", tasks.x, tasks.w)
  np.testing.assert_allclose(error.std(), 0.5, rtol=0.03)
  exact = jnp.einsum("bnd,bd->bn", tasks.queries, tasks.w)
  np.testing.assert_allclose(tasks.targets, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_examples": 0, "dim": 2}, "num_examples must be >= 1, got 0"),
    ({"num_examples": 2, "dim": 0}, "dim must be >= 1, got 0"),
    (
      {"num_examples": 2, "dim": 2, "num_queries": 0},
      "num_queries must be >= 1, got 0",
    ),
    (
      {"num_examples": 2, "dim": 2, "noise": -1.0},
      "noise must be non-negative, got -1.0",
    ),
    (
      {"num_examples": 2, "dim": 2, "covariance": jnp.eye(3)},
      "covariance must have shape (2, 2) = (dim, dim), got (3, 3)",
    ),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    sample_icl_task(jax.random.key(0), **options)
