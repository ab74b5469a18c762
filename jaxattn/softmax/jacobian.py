r"""Products with the Jacobian of a row-wise softmax.

With :math:`S = \operatorname{softmax}(L)` by rows, a change :math:`\dot L` of
the logits changes S by

.. math::

  \dot S = J_S(\dot L), \qquad J_S(T) = S \circ (T - \mu 1^\top), \quad
  \mu = (S \circ T) 1.

:math:`J_S` is its own adjoint, so that the same product pulls a gradient with
respect to S back to the logits. Gradients of losses of attention are written
with it, and their derivatives with :func:`softmax_jacobian_matvec_jvp`. A
weight of 0, as of a masked key, stays without influence.
"""

import jax

from jaxattn import _checks


def softmax_jacobian_matvec(probs: jax.Array, t: jax.Array) -> jax.Array:
  r"""The product :math:`S \circ (T - (S \circ T) 1 1^\top)`.

  Args:
    probs: S, (..., S): weights that sum to 1 along the last axis.
    t: T, of the same shape.

  Returns:
    The same shape; sums to 0 along the last axis.

  Raises:
    ValueError: if the shapes differ or are empty.

  Cost:
    O(size), elementwise: S itself is never formed as a matrix of a row.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.softmax import softmax_jacobian_matvec
    >>> probs = jnp.array([0.5, 0.5, 0.0])
    >>> print(softmax_jacobian_matvec(probs, jnp.array([1.0, 3.0, 9.0])))
    [-0.5  0.5  0. ]
  """
  _check(probs, t=t)
  return probs * (t - _mean(probs, t))


def softmax_jacobian_matvec_jvp(
  probs: jax.Array, probs_dot: jax.Array, t: jax.Array, t_dot: jax.Array
) -> jax.Array:
  r"""How the product with the Jacobian changes with S and with T.

  .. math::

    \dot S \circ (T - \mu 1^\top) + S \circ (\dot T - \dot \mu 1^\top), \qquad
    \dot \mu = (\dot S \circ T + S \circ \dot T) 1

  Args:
    probs: S, (..., S): weights that sum to 1 along the last axis.
    probs_dot: its tangent; of a softmax, ``softmax_jacobian_matvec(probs,
      logits_dot)``.
    t: T, of the same shape.
    t_dot: its tangent.

  Returns:
    The tangent of ``softmax_jacobian_matvec(probs, t)``.

  Raises:
    ValueError: if the shapes differ or are empty.

  Cost:
    O(size), elementwise.

  Source:
    the product rule.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.softmax import softmax_jacobian_matvec_jvp
    >>> probs, t = jnp.array([0.5, 0.5]), jnp.array([1.0, 3.0])
    >>> probs_dot, t_dot = jnp.array([0.25, -0.25]), jnp.array([0.0, 2.0])
    >>> print(softmax_jacobian_matvec_jvp(probs, probs_dot, t, t_dot))
    [-0.5  0.5]
  """
  _check(probs, probs_dot=probs_dot, t=t, t_dot=t_dot)
  mean_dot = (probs_dot * t + probs * t_dot).sum(-1, keepdims=True)
  return probs_dot * (t - _mean(probs, t)) + probs * (t_dot - mean_dot)


def _mean(probs: jax.Array, t: jax.Array) -> jax.Array:
  return (probs * t).sum(-1, keepdims=True)


def _check(probs: jax.Array, **others: jax.Array) -> None:
  if probs.ndim == 0 or 0 in probs.shape:
    raise ValueError(f"probs must not be empty, got shape {probs.shape}")
  for name, x in others.items():
    _checks.check_shape(name, x, probs.shape, "shape of probs")
