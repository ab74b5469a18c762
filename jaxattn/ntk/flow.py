r"""What a tangent kernel predicts of training.

For the loss :math:`L = \tfrac12 \sum_i (f_i - y_i)^2` (a sum, not a mean) of a
model that stays linear in its parameters, a step of gradient descent of size
:math:`\eta` multiplies the residual by :math:`I - \eta H`, where H is the
kernel of the model. With :math:`H = U \mathrm{diag}(\lambda) U^\top` and
:math:`r = y - f_0` the outputs on data X and on others have moved by

.. math::

  f_t(X) - f_0(X) &= U (1 - g_t(\lambda))\, U^\top r \\
  f_t(x) - f_0(x) &= H(x, X)\, U\, \frac{1 - g_t(\lambda)}{\lambda}\, U^\top r,

where :math:`g_t(\lambda)` is :math:`e^{-t \lambda}` after time t of gradient
flow and :math:`(1 - \eta \lambda)^t` after t steps. Kernels are in units of the
model that is trained (m times the kernel of f if :math:`\sqrt m f` is), so
:math:`\eta = c / \lambda_{\max}` means the same to all.

A kernel is (n, O, n, O), or (n, n): one output, or the same kernel for each of
O outputs that do not interact, which is factored once. Source: Jacot et al.,
arXiv 1806.07572; Lee et al., arXiv 1902.06720.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import _blocks
from jaxattn.numerics._dtypes import accumulator

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class KernelFactor(NamedTuple):
  """Eigenvalues and eigenvectors of a kernel, from :func:`kernel_factor`.

  Attributes:
    eigenvalues: (k,), ascending, at least 0; the largest step size that does
      not diverge is 2 / eigenvalues[-1].
    eigenvectors: (n, k = n), or (n, O, k = n O) of an (n, O, n, O) kernel.
  """

  eigenvalues: jax.Array
  eigenvectors: jax.Array


def kernel_factor(kernel: jax.Array) -> KernelFactor:
  """Factors a kernel once, for predictions at any number of times.

  Computed in the kernel's precision: where small eigenvalues matter, in
  float64.

  Args:
    kernel: (n, n) or (n, O, n, O); symmetric and positive semidefinite up to
      rounding, which is taken off: eigenvalues down to -1e-5 of the largest
      count as 0 (with 16-bit kernels, four units of their rounding).

  Returns:
    The :class:`KernelFactor`. Under ``jit``, where nothing can be raised, the
    eigenvalues of a kernel that is further from symmetric or positive are NaN.

  Raises:
    ValueError: if the shape or dtype does not fit, or a concrete kernel is not
      finite, not symmetric or not positive semidefinite;
      :func:`descent_recursion` takes any that is finite.

  Cost:
    O(n^3), or O((n O)^3) of an (n, O, n, O) kernel; beyond some 3000 rows
    :func:`descent_recursion` is cheaper.

  Source:
    arXiv 1902.06720, section 2.2.

  Example:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from jaxattn.ntk import kernel_factor
    >>> factor = kernel_factor(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> print(np.asarray(factor.eigenvalues).round(3))
    [1. 3.]
  """
  kernel = jnp.asarray(kernel)
  _blocks.check_kernel(kernel)
  return _checked_factor(kernel)


def flow_train(
  factor: KernelFactor, residual: jax.Array, times: jax.Array
) -> jax.Array:
  """How far gradient flow moves the outputs on the data it fits.

  Args:
    factor: of the kernel on these data.
    residual: (n,) or (n, O), targets minus outputs at the start.
    times: () or (S,), not negative; all of them cost one product.

  Returns:
    f_t - f_0, (S, n) or (S, n, O); without the first axis for one time.

  Raises:
    ValueError: if shapes do not fit, or a concrete time is negative.

  Cost:
    O(S n^2 O), or O(S (n O)^2) of an (n, O, n, O) kernel.

  Source:
    arXiv 1902.06720, equations 8 and 9.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import flow_train, kernel_factor
    >>> factor = kernel_factor(jnp.diag(jnp.array([1.0, 0.0])))
    >>> print(flow_train(factor, jnp.array([1.0, 1.0]), jnp.array([0.0, 99.0])))
    [[0. 0.]
     [1. 0.]]
  """
  residual = _check_residual(factor, residual)
  times = _check_times(times)
  gain = -jnp.expm1(-_outer(times, factor))
  return _expand(factor, None, gain, residual)


def flow_test(
  factor: KernelFactor,
  k_test_train: jax.Array,
  residual: jax.Array,
  times: jax.Array,
) -> jax.Array:
  """How far gradient flow moves the outputs on other data.

  Args:
    factor: of the kernel on the data that are fitted.
    k_test_train: (n2, n), or (n2, O, n, O) if the factor's kernel is
      (n, O, n, O).
    residual: (n,) or (n, O), targets minus outputs at the start.
    times: () or (S,), not negative.

  Returns:
    f_t - f_0 on the other data, (S, n2) or (S, n2, O); without the first axis
    for one time.

  Raises:
    ValueError: if shapes do not fit, or a concrete time is negative.

  Cost:
    O(S n (n + n2) O), or O(S n (n + n2) O^2) of an (n, O, n, O) kernel.

  Source:
    arXiv 1902.06720, equations 10 and 11.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import flow_test, kernel_factor
    >>> factor = kernel_factor(jnp.eye(2))
    >>> k_test_train, residual = jnp.array([[0.5, 0.5]]), jnp.array([1.0, 3.0])
    >>> print(flow_test(factor, k_test_train, residual, 99.0))
    [2.]
  """
  residual = _check_residual(factor, residual)
  k_test_train = _check_test(factor, k_test_train)
  times = _check_times(times)
  gain = _over_eigenvalues(
    -jnp.expm1(-_outer(times, factor)), times, factor.eigenvalues
  )
  return _expand(factor, k_test_train, gain, residual)


def descent_train(
  factor: KernelFactor,
  residual: jax.Array,
  learning_rate: float | jax.Array,
  num_steps: int | Sequence[int] | jax.Array,
) -> jax.Array:
  """How far gradient descent moves the outputs on the data it fits.

  Args:
    factor: of the kernel on these data.
    residual: (n,) or (n, O), targets minus outputs at the start.
    learning_rate: of the loss, a half of the sum of squares; below
      2 / eigenvalues[-1].
    num_steps: () or (S,) integers, not negative; all of them cost one product.

  Returns:
    f_t - f_0 after so many steps, (S, n) or (S, n, O); without the first axis
    for one number.

  Raises:
    ValueError: if shapes do not fit, a concrete number of steps is negative,
      or a concrete rate is not positive or diverges.

  Cost:
    O(S n^2 O), or O(S (n O)^2) of an (n, O, n, O) kernel.

  Source:
    arXiv 1902.06720, section 2.2, in discrete time.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import descent_train, kernel_factor
    >>> factor = kernel_factor(jnp.eye(2))
    >>> print(descent_train(factor, jnp.array([1.0, 4.0]), 0.5, 2))
    [0.75 3.  ]
  """
  residual = _check_residual(factor, residual)
  rate, num_steps = _check_descent(factor, learning_rate, num_steps)
  gain = _descent_gain(factor.eigenvalues, rate, num_steps)
  return _expand(factor, None, gain, residual)


def descent_test(
  factor: KernelFactor,
  k_test_train: jax.Array,
  residual: jax.Array,
  learning_rate: float | jax.Array,
  num_steps: int | Sequence[int] | jax.Array,
) -> jax.Array:
  """How far gradient descent moves the outputs on other data.

  Args:
    factor: of the kernel on the data that are fitted.
    k_test_train: (n2, n), or (n2, O, n, O) if the factor's kernel is
      (n, O, n, O).
    residual: (n,) or (n, O), targets minus outputs at the start.
    learning_rate: of the loss, a half of the sum of squares; below
      2 / eigenvalues[-1].
    num_steps: () or (S,) integers, not negative.

  Returns:
    f_t - f_0 on the other data, (S, n2) or (S, n2, O); without the first axis
    for one number.

  Raises:
    ValueError: if shapes do not fit, a concrete number of steps is negative,
      or a concrete rate is not positive or diverges.

  Cost:
    O(S n (n + n2) O), or O(S n (n + n2) O^2) of an (n, O, n, O) kernel.

  Source:
    arXiv 1902.06720, section 2.2, in discrete time.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import descent_test, kernel_factor
    >>> factor = kernel_factor(jnp.eye(2))
    >>> k_test_train, residual = jnp.array([[1.0, 1.0]]), jnp.array([1.0, 3.0])
    >>> print(descent_test(factor, k_test_train, residual, 0.5, [0, 2]))
    [[0.]
     [3.]]
  """
  residual = _check_residual(factor, residual)
  k_test_train = _check_test(factor, k_test_train)
  rate, num_steps = _check_descent(factor, learning_rate, num_steps)
  gain = _over_eigenvalues(
    _descent_gain(factor.eigenvalues, rate, num_steps),
    rate * num_steps,
    factor.eigenvalues,
  )
  return _expand(factor, k_test_train, gain, residual)


def descent_recursion(
  kernel: jax.Array,
  residual: jax.Array,
  learning_rate: float | jax.Array,
  num_steps: int | Sequence[int] | jax.Array,
) -> tuple[jax.Array, jax.Array]:
  r"""Gradient descent with a fixed kernel, step by step.

  .. math:: e_0 = r, \quad e_{t+1} = e_t - \eta H e_t, \qquad
    \alpha_t = \eta \sum_{s < t} e_s

  Needs no eigenvalues: for kernels that are too large for them, or that are not
  symmetric. :math:`H(x, X)\, \alpha_t` is how far outputs on other data moved.
  Any rate goes; above 2 / lambda_max it diverges.

  Args:
    kernel: (n, n) or (n, O, n, O).
    residual: (n,) or (n, O), targets minus outputs at the start.
    learning_rate: eta, of the loss, a half of the sum of squares.
    num_steps: () or (S,) integers, not negative, ascending.

  Returns:
    e and alpha after so many steps, each (S, n) or (S, n, O); without the first
    axis for one number.

  Raises:
    ValueError: if shapes or dtypes do not fit, concrete numbers of steps are
      negative or not ascending, or a concrete rate is not positive.

  Cost:
    n^2 O, or (n O)^2, a step.

  Source:
    arXiv 1902.06720, section 2.2, in discrete time.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import descent_recursion
    >>> kernel = jnp.array([[1.0, 0.5], [0.0, 1.0]])
    >>> error, alpha = descent_recursion(kernel, jnp.ones(2), 0.5, 2)
    >>> print(error, alpha)
    [0.   0.25] [0.625 0.75 ]
  """
  kernel, residual = jnp.asarray(kernel), jnp.asarray(residual)
  _blocks.check_kernel(kernel)
  _blocks.check_residual(residual, kernel.shape[: kernel.ndim // 2])
  _check_rate(learning_rate)
  num_steps = _check_steps(num_steps)
  if _checks.is_concrete(num_steps) and np.any(np.diff(num_steps.ravel()) < 0):
    raise ValueError(f"num_steps must be ascending, got {num_steps}")
  return _descent_recursion(kernel, residual, learning_rate, num_steps)


def linearized_loss(
  kernel: jax.Array,
  residual: jax.Array,
  learning_rate: float | jax.Array,
  num_steps: int,
) -> jax.Array:
  r"""Losses that gradient descent would have, if the kernel stayed fixed.

  With eigenpairs :math:`(\lambda_j, v_j)` of the kernel and :math:`c_j = v_j
  \cdot r`,

  .. math:: L_t = \tfrac12 \sum_j c_j^2 (1 - \eta \lambda_j)^{2 t}.

  Rates above :math:`2 / \lambda_{\max}` diverge, which the formula shows.

  Args:
    kernel: (n, O, n, O) of n data with O outputs, or (n, n); as
      :func:`kernel_factor` wants it. In units of the model that is trained: m
      times the kernel of f if :math:`\sqrt m f` is.
    residual: (n, O) or (n,), targets minus outputs at the start.
    learning_rate: step size on the loss, a half of the sum of squares.
    num_steps: steps to predict.

  Returns:
    (num_steps + 1,) losses after 0, 1, ... steps; NaN under ``jit`` for kernels
      that are refused outside of it.

  Raises:
    ValueError: if shapes or dtypes do not fit, :func:`kernel_factor` refuses
      the kernel, the learning rate is not a positive number, or ``num_steps``
      is negative.

  Cost:
    O((n O)^3) for eigenvalues, then O(n O) a step.

  Source:
    arXiv 1902.06720, section 2.2, in discrete time.

  Example:
    >>> import jax.numpy as jnp
    >>> loss = linearized_loss(jnp.eye(2), jnp.array([3.0, 4.0]), 0.5, 2)
    >>> print(loss)
    [12.5     3.125   0.78125]
  """
  kernel, residual = jnp.asarray(kernel), jnp.asarray(residual)
  _checks.check_floating("kernel", kernel)
  _checks.check_rank("residual", residual, (1, 2))
  _checks.check_shape("kernel", kernel, residual.shape * 2, "residual twice")
  _check_rate(learning_rate)
  _checks.check_integer("num_steps", num_steps, 0, None)
  factor = _checked_factor(kernel)
  return _linearized_loss(factor, residual, learning_rate, num_steps)


# --- checks ---


def _checked_factor(kernel: jax.Array) -> KernelFactor:
  factor = _factor(kernel)
  values = factor.eigenvalues
  if _checks.is_concrete(values) and np.isnan(values).any():
    if not np.isfinite(np.asarray(kernel)).all():
      raise ValueError("kernel must be finite, got one that is not")
    raise ValueError(
      "kernel must be symmetric and positive semidefinite up to rounding, got "
      "one that is not; descent_recursion takes any"
    )
  return factor


def _check_residual(factor: KernelFactor, residual: jax.Array) -> jax.Array:
  residual = jnp.asarray(residual)
  _blocks.check_residual(residual, factor.eigenvectors.shape[:-1])
  return residual.astype(factor.eigenvalues.dtype)


def _check_test(factor: KernelFactor, k_test_train: jax.Array) -> jax.Array:
  k_test_train = jnp.asarray(k_test_train)
  _checks.check_floating("k_test_train", k_test_train)
  data = factor.eigenvectors.shape[:-1]
  shape = (None, *data[1:], *data)
  layout = "(n2, n)" if len(data) == 1 else "(n2, O, n, O)"
  _checks.check_shape("k_test_train", k_test_train, shape, layout)
  return k_test_train.astype(factor.eigenvalues.dtype)


def _check_times(times: jax.Array) -> jax.Array:
  times = jnp.asarray(times)
  _checks.check_rank("times", times, (0, 1))
  _checks.check_nonnegative("times", times)
  return times


def _check_steps(num_steps: int | Sequence[int] | jax.Array) -> jax.Array:
  num_steps = jnp.asarray(num_steps)
  _checks.check_rank("num_steps", num_steps, (0, 1))
  if not jnp.issubdtype(num_steps.dtype, jnp.integer):
    raise ValueError(f"num_steps must be integers, got {num_steps.dtype}")
  _checks.check_nonnegative("num_steps", num_steps)
  return num_steps


def _check_rate(learning_rate: float | jax.Array) -> None:
  _checks.check_scalar("learning_rate", learning_rate)
  _checks.check_positive("learning_rate", learning_rate)


def _check_descent(
  factor: KernelFactor,
  learning_rate: float | jax.Array,
  num_steps: int | Sequence[int] | jax.Array,
) -> tuple[jax.Array, jax.Array]:
  _check_rate(learning_rate)
  largest = factor.eigenvalues[-1]
  if _checks.is_concrete(learning_rate) and _checks.is_concrete(largest):
    if learning_rate * float(largest) >= 2:
      raise ValueError(
        f"learning_rate={float(learning_rate):.6g} >= 2/lambda_max="
        f"{2 / float(largest):.6g}: the recursion diverges"
      )
  rate = jnp.asarray(learning_rate, factor.eigenvalues.dtype)
  return rate, _check_steps(num_steps)


# --- predictions ---


@jax.jit
def _factor(kernel: jax.Array) -> KernelFactor:
  half = kernel.shape[: kernel.ndim // 2]
  size = math.prod(half)
  matrix = kernel.reshape(size, size).astype(accumulator(kernel.dtype))
  values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
  tolerance = max(1e-5, 4 * float(jnp.finfo(kernel.dtype).eps))
  asymmetry = jnp.abs(matrix - matrix.T).max()
  fits = (values[0] >= -tolerance * values[-1]) & (
    asymmetry <= tolerance * jnp.abs(matrix).max()
  )
  values = jnp.where(fits, jnp.maximum(values, 0), jnp.nan)
  return KernelFactor(values, vectors.reshape(*half, -1))


def _outer(times: jax.Array, factor: KernelFactor) -> jax.Array:
  """Times by eigenvalues, (S, k) or (k,)."""
  values = factor.eigenvalues
  return jnp.multiply.outer(times.astype(values.dtype), values)


def _over_eigenvalues(
  gain: jax.Array, slope: jax.Array, eigenvalues: jax.Array
) -> jax.Array:
  """(1 - g) / lambda, and its limit, the slope in lambda, where that is 0."""
  shape = gain.shape
  values = jnp.broadcast_to(eigenvalues, shape)
  limit = jnp.broadcast_to(slope.astype(gain.dtype)[..., None], shape)
  positive = values > 0
  return jnp.where(positive, gain / jnp.where(positive, values, 1), limit)


def _descent_gain(
  eigenvalues: jax.Array, rate: jax.Array, num_steps: jax.Array
) -> jax.Array:
  """1 - (1 - eta lambda)^t, exact to rounding for small eta lambda too."""
  step = rate * eigenvalues
  t = jnp.expand_dims(num_steps, -1)
  # Beyond 1 the base is negative; at 1 its power is that of 0.
  slow = step < 0.5
  exponent = jnp.log1p(-jnp.where(slow, step, 0))
  by_log = -jnp.expm1(jnp.multiply(*_broadcast(t.astype(step.dtype), exponent)))
  by_power = 1 - jnp.power(*_broadcast(1 - jnp.where(slow, 1, step), t))
  return jnp.where(jnp.broadcast_to(slow, by_log.shape), by_log, by_power)


def _broadcast(*arrays: jax.Array) -> list[jax.Array]:
  """Of one rank, as strict rank promotion wants it."""
  shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
  return [jnp.broadcast_to(x, shape) for x in arrays]


@jax.jit
def _expand(
  factor: KernelFactor,
  k_test_train: jax.Array | None,
  gain: jax.Array,
  residual: jax.Array,
) -> jax.Array:
  """H(x, X) U gain U^T r, or U gain U^T r: (S, n2, ...), or without S."""
  vectors = factor.eigenvectors
  data, k = vectors.shape[:-1], vectors.shape[-1]
  vectors = vectors.reshape(k, k)
  columns = residual.reshape(k, -1)  # more than one: outputs that do not mix
  times = gain.reshape(-1, k)
  modes = times[:, :, None] * _matmul(vectors.T, columns)[None]
  moved = _matmul(vectors, modes)
  if k_test_train is not None:
    moved = _matmul(k_test_train.reshape(-1, k), moved)
    data = k_test_train.shape[: k_test_train.ndim // 2]
  outputs = residual.shape[1:] if len(data) == 1 else ()
  return moved.reshape(*gain.shape[:-1], *data, *outputs)


@jax.jit
def _descent_recursion(
  kernel: jax.Array,
  residual: jax.Array,
  learning_rate: jax.Array,
  num_steps: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  size = math.prod(kernel.shape[: kernel.ndim // 2])
  matrix = kernel.reshape(size, size).astype(accumulator(kernel.dtype))
  start = residual.reshape(size, -1).astype(matrix.dtype)
  rate = jnp.asarray(learning_rate, matrix.dtype)

  def step(_: int, state: tuple) -> tuple[jax.Array, jax.Array]:
    error, alpha = state
    return error - rate * _matmul(matrix, error), alpha + rate * error

  def stretch(state: tuple, length: jax.Array) -> tuple:
    state = lax.fori_loop(0, length, step, state)
    return state, state

  ends = num_steps.reshape(-1)
  lengths = jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))
  _, path = lax.scan(stretch, (start, jnp.zeros_like(start)), lengths)
  shape = (*num_steps.shape, *residual.shape)
  error, alpha = (x.reshape(shape) for x in path)
  return error, alpha


@functools.partial(jax.jit, static_argnums=3)
def _linearized_loss(
  factor: KernelFactor,
  residual: jax.Array,
  learning_rate: jax.Array,
  num_steps: int,
) -> jax.Array:
  eigenvalues, dtype = factor.eigenvalues, factor.eigenvalues.dtype
  vectors = factor.eigenvectors.reshape(-1, eigenvalues.size)
  squares = jnp.square(_matmul(residual.reshape(-1).astype(dtype), vectors))
  gain = jnp.square(1 - jnp.asarray(learning_rate, dtype) * eigenvalues)

  def step(squares: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    return squares * gain, squares.sum() / 2

  _, losses = lax.scan(step, squares, None, length=num_steps + 1)
  return losses
