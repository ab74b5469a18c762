"""How often the fixed network fires, and from which amplitude on."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxattn.models import (
  separation_false_positive,
  separation_transition,
  separation_weight,
)
from tests.models._separation import (
  num_neurons,
  outputs,
)

# --- the transition ---


@pytest.mark.parametrize("margin", [0.1, 0.3])
def test_predicted_transition_solves_its_equation(margin):
  for asks in (None, 0.0):
    a = separation_transition(2000, 0.2, margin=margin, query_amplitude=asks)
    weight = separation_weight(2000, a, query_amplitude=asks)
    np.testing.assert_allclose(weight * (a + 0.2), margin, rtol=1e-9)


def test_predicted_transitions():
  lengths = (500, 1000, 2000, 5000, 20000)
  got = [separation_transition(n, 0.2) for n in lengths]
  np.testing.assert_allclose(
    got, [0.483, 0.496, 0.507, 0.518, 0.532], atol=1e-3
  )
  assert got[-1] < separation_transition(10**30, 0.2) < 0.619


def test_measured_transition():
  # The amplitude at which half of 30 seeds are separated, by bisection.
  measured = []
  for length, dim in ((500, 52), (1000, 102), (2000, 102)):
    run = functools.partial(
      outputs,
      jax.random.key(length),
      b=0.2,
      attention="softmax",
      num_seeds=30,
      length=length,
      dim=dim,
      m=num_neurons(length),
    )
    low, high = 0.2, 0.8
    for _ in range(8):
      middle = (low + high) / 2
      half = (run(amplitude=middle) > 0).mean() >= 0.5
      low, high = (low, middle) if half else (middle, high)
    predicted = separation_transition(length, 0.2)
    assert predicted - 0.08 <= high <= predicted + 0.01
    measured.append(high)
  assert measured == sorted(set(measured))


# --- false positives ---


def _false_positives(dim, b, num_seeds, attention):
  length = (dim - 2) * 8
  m = 100
  out = outputs(
    jax.random.key(dim),
    0.0,
    b,
    attention=attention,
    num_seeds=num_seeds,
    length=length,
    dim=dim,
    m=m,
  )
  return float((out > 0).mean()), separation_false_positive(dim, b, m)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_false_positives(attention):
  rate, predicted = _false_positives(102, 0.5, 400, attention)
  error = math.sqrt(predicted * (1 - predicted) / 400)
  assert abs(rate - predicted) < 4 * error


def test_false_positives_fall_with_dim():
  predicted = [separation_false_positive(d, 0.5, 100) for d in (22, 102, 402)]
  assert predicted[0] > predicted[1] > predicted[2]
  measured = [_false_positives(d, 0.5, 100, "softmax")[0] for d in (22, 102)]
  assert measured[0] > measured[1]
  np.testing.assert_allclose(
    separation_false_positive(51, 0.2, 100), 0.011, atol=1e-3
  )
  assert separation_false_positive(100, 0.2, 100) < 1e-4
  assert separation_false_positive(258, 0.3, 100) < 1e-4


def test_false_positive_probability_by_counting():
  # All sign vectors of length 8: (d - 2) / 2 + 0.05 (d - 2) / b = 4.8 pluses.
  signs = np.array(np.meshgrid(*[[-1, 1]] * 7, indexing="ij")).reshape(7, -1)
  fires = (0.5 * signs[:6].mean(0) > 0.1) & (signs[6] > 0)
  want = 1 - (1 - fires.mean()) ** 5
  np.testing.assert_allclose(separation_false_positive(8, 0.5, 5), want)
