r"""A network of one hidden layer for sums of k numbers modulo p.

Inputs are :math:`a \in \mathbb{Z}_p^k`, the label is :math:`y = \sum_j a_j
\bmod p`, and a neuron with parameters :math:`\theta_i = (u_{i1}, \ldots,
u_{ik}, w_i)`, all in :math:`\mathbb{R}^p`, takes the k-th power:

.. math:: f(\theta, a) = \sum_{i < m} \Big(\sum_j u_{ij}[a_j]\Big)^k w_i.

It is homogeneous of degree k + 1, and its norm is that of groups,

.. math:: \|\theta\|_{2, k+1} = \Big(\sum_i \|\theta_i\|_2^{k+1}\Big)^{1/(k+1)}.

An input is never made one-hot: a product with a one-hot matrix is a look-up.
Source: arXiv 2402.09469, section 3; for k = 2 arXiv 2311.07568.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, _compat
from jaxattn.numerics._dtypes import accumulator

# Data sets are numbered by 32 bits; one of this size takes 1 GiB a term.
_MOST_INPUTS = 2**28


class PolyNet(NamedTuple):
  """Parameters of m neurons for k inputs modulo p.

  Attributes:
    inner: (m, k, p), u_ij.
    outer: (m, p), w_i.
  """

  inner: jax.Array
  outer: jax.Array


def init(
  rng: jax.Array,
  width: int,
  modulus: int,
  num_terms: int,
  *,
  std: float | jax.Array = 0.1,
  dtype: Any = jnp.float32,
) -> PolyNet:
  """Draws parameters from N(0, std^2).

  Args:
    rng: PRNG key.
    width: m, neurons.
    modulus: p, odd.
    num_terms: k, at least 2.
    std: standard deviation, positive; in float32 not much smaller than 0.1, or
      the k-th power and with it all gradients vanish.
    dtype: of the parameters.

  Returns:
    The parameters.

  Raises:
    ValueError: if a size is too small, the modulus even or std not positive.

  Cost:
    O(m k p).

  Source:
    arXiv 2402.09469, section 5.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import margin
    >>> params = margin.init(jax.random.key(0), 8, 5, 3)
    >>> params.inner.shape, params.outer.shape
    ((8, 3, 5), (8, 5))
  """
  _checks.check_integer("width", width, 1, None)
  check_problem(modulus, num_terms)
  _checks.check_scalar("std", std)
  _checks.check_positive("std", std)
  rng_inner, rng_outer = jax.random.split(rng)
  shape = width, num_terms, modulus
  inner = jax.random.normal(rng_inner, shape, dtype)
  outer = jax.random.normal(rng_outer, (width, modulus), dtype)
  std = jnp.asarray(std, dtype)
  return PolyNet(std * inner, std * outer)


def apply(params: PolyNet, inputs: jax.Array) -> jax.Array:
  """Evaluates the network.

  Args:
    params: m neurons.
    inputs: (n, k) integers in [0, p).

  Returns:
    (n, p) outputs, of the parameters' dtype; NaN for an input out of range, of
    which only tracing keeps from refusing it.

  Raises:
    ValueError: if shapes or dtypes do not fit, or an input is out of range.

  Cost:
    O(n m (k + p)) time, O(n (m + p)) memory.

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import margin
    >>> net = margin.fourier_network(5, 2)
    >>> inputs = jnp.array([[1, 2], [4, 4]])
    >>> print(margin.apply(net, inputs).argmax(1))
    [3 3]
  """
  params = check_network(params)
  inputs = check_inputs(params, inputs)
  return _apply(params, inputs)


def group_norm(params: PolyNet) -> jax.Array:
  """The norm of the parameters, l_{k+1} over neurons of l_2 in each.

  Args:
    params: m neurons.

  Returns:
    ().

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(m k p).

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> from jaxattn.ntk import margin
    >>> print(f"{margin.group_norm(margin.fourier_network(5, 2)):.4f}")
    1.0000
  """
  params = check_network(params)
  return _group_norm(params)


def normalize(params: PolyNet) -> PolyNet:
  """Divides the parameters by their norm.

  The margin is then that of the network over norm^(k + 1).

  Args:
    params: m neurons.

  Returns:
    Parameters of norm 1; those that are all 0 stay so.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(m k p).

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import margin
    >>> params = margin.init(jax.random.key(0), 8, 5, 3)
    >>> print(f"{margin.group_norm(margin.normalize(params)):.4f}")
    1.0000
  """
  params = check_network(params)
  norm = _group_norm(params)
  norm = jnp.where(norm > 0, norm, 1)
  return PolyNet(params.inner / norm, params.outer / norm)


def modular_inputs(modulus: int, num_terms: int) -> jax.Array:
  """All p^k inputs, the last term running fastest.

  Args:
    modulus: p, odd.
    num_terms: k, at least 2.

  Returns:
    (p^k, k) of int32.

  Raises:
    ValueError: if the modulus is even or below 3, k below 2 or p^k above 2^28.

  Cost:
    O(p^k k).

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> from jaxattn.ntk import modular_inputs
    >>> print(modular_inputs(3, 2)[3:5])
    [[1 0]
     [1 1]]
  """
  check_problem(modulus, num_terms)
  count = modulus**num_terms
  if count > _MOST_INPUTS:
    raise ValueError(
      f"modulus**num_terms must be at most 2**28, got {modulus}**{num_terms} "
      f"= {count}"
    )
  return digits(jnp.arange(count, dtype=jnp.int32), modulus, num_terms)


def modular_labels(inputs: jax.Array, modulus: int) -> jax.Array:
  """Sums modulo p.

  Args:
    inputs: (n, k) integers in [0, p).
    modulus: p, odd.

  Returns:
    (n,) of int32.

  Raises:
    ValueError: if shapes or dtypes do not fit, the modulus is even or below 3,
      or an input is out of range.

  Cost:
    O(n k).

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import modular_labels
    >>> print(modular_labels(jnp.array([[4, 3, 2], [0, 1, 2]]), 5))
    [4 3]
  """
  inputs = jnp.asarray(inputs)
  _checks.check_rank("inputs", inputs, 2)
  check_problem(modulus, inputs.shape[1])
  check_values("inputs", inputs, modulus)
  return inputs.astype(jnp.int32).sum(1) % jnp.int32(modulus)


# --- for the other modules of this package, and for training ---


def check_problem(modulus: Any, num_terms: Any) -> None:
  """Raises unless the theory holds for these numbers."""
  _checks.check_integer("num_terms", num_terms, 2, None)
  is_int = isinstance(modulus, (int, np.integer))
  if not is_int or modulus < 3 or modulus % 2 == 0:
    raise ValueError(f"modulus must be odd and >= 3, got {modulus!r}")


def check_network(params: PolyNet) -> PolyNet:
  """The parameters as arrays, if they are those of a network."""
  inner, outer = (jnp.asarray(x) for x in params)
  _checks.check_rank("params.inner", inner, 3)
  m, k, p = inner.shape
  _checks.check_integer("width", m, 1, None)
  check_problem(p, k)
  _checks.check_shape("params.outer", outer, (m, p), "(m, p)")
  _checks.check_one_dtype(**{"params.inner": inner, "params.outer": outer})
  return PolyNet(inner, outer)


def check_inputs(
  params: PolyNet, inputs: jax.Array, name: str = "inputs"
) -> jax.Array:
  """The inputs as an array, if they are those of this network."""
  inputs = jnp.asarray(inputs)
  _, k, p = params.inner.shape
  _checks.check_shape(name, inputs, (None, k), "(n, k)")
  check_values(name, inputs, p)
  return inputs


def check_values(name: str, x: jax.Array, modulus: int) -> None:
  """Raises unless these are integers in [0, p), as far as can be seen."""
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {x.dtype}")
  if x.size:
    _checks.check_range(f"all {name}", x, 0, modulus - 1)


def digits(number: jax.Array, modulus: int, num_terms: int) -> jax.Array:
  """(..., k) digits in base p, of the highest place first."""
  places = jnp.asarray(
    [modulus**j for j in reversed(range(num_terms))], number.dtype
  )
  shape = (1,) * number.ndim + places.shape
  base = jnp.asarray(modulus, number.dtype)
  return number[..., None] // places.reshape(shape) % base


def norms(params: PolyNet) -> jax.Array:
  """(m,) squared norms of neurons, in 32 bits or more."""
  inner, outer = (x.astype(accumulator(x.dtype)) for x in params)
  return jnp.square(inner).sum((1, 2)) + jnp.square(outer).sum(1)


def norm_power(params: PolyNet) -> jax.Array:
  """The (k + 1)-th power of the norm, smooth also at 0."""
  k = params.inner.shape[1]
  squares = norms(params)
  if k % 2:
    return lax.integer_pow(squares, (k + 1) // 2).sum()
  # A root of 0 would have no gradient.
  root = jnp.sqrt(jnp.where(squares > 0, squares, 1))
  return (lax.integer_pow(squares, k // 2) * root).sum()


def outputs(params: PolyNet, inputs: jax.Array) -> jax.Array:
  """(n, p) outputs, in 32 bits or more, without checks."""
  k = params.inner.shape[1]
  dtype = accumulator(params.inner.dtype)
  # Rows of neighboring numbers: looking up columns is far slower.
  tables = _compat.row_major(params.inner.transpose(1, 2, 0))
  hidden = functools.reduce(
    jnp.add,
    (
      tables[j]
      .at[inputs[:, j]]
      .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
      .astype(dtype)
      for j in range(k)
    ),
  )
  return jnp.matmul(
    lax.integer_pow(hidden, k),
    params.outer.astype(dtype),
    precision=lax.Precision.HIGHEST,
  )


@jax.jit
def _apply(params: PolyNet, inputs: jax.Array) -> jax.Array:
  return outputs(params, inputs).astype(params.outer.dtype)


@jax.jit
def _group_norm(params: PolyNet) -> jax.Array:
  k = params.inner.shape[1]
  squares = norms(params)
  # Powers of numbers up to 1 do not overflow.
  scale = lax.stop_gradient(jnp.where(squares.max() > 0, squares.max(), 1))
  total = ((squares / scale) ** ((k + 1) / 2)).sum()
  norm = total ** (1 / (k + 1)) * jnp.sqrt(scale)
  return norm.astype(params.inner.dtype)
