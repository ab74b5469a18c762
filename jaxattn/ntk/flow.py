r"""What a tangent kernel predicts of training.

For the loss :math:`L = \tfrac12 \sum_i (f_i - y_i)^2` (a sum, not a mean) of a
model that stays linear in its parameters, a step of gradient descent of size
:math:`\eta` multiplies the residual by :math:`I - \eta H`, where H is the
kernel of the model. Source: Jacot et al., arXiv 1806.07572; Lee et al., arXiv
1902.06720.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator


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
    kernel: (n, O, n, O) of n data with O outputs, or (n, n); symmetric up to
      rounding. In units of the model that is trained: m times the kernel of f
      if :math:`\sqrt m f` is.
    residual: (n, O) or (n,), targets minus outputs at the start.
    learning_rate: step size on the loss, a half of the sum of squares.
    num_steps: steps to predict.

  Returns:
    (num_steps + 1,) losses after 0, 1, ... steps.

  Raises:
    ValueError: if shapes or dtypes do not fit, the learning rate is not a
      positive number, or ``num_steps`` is negative.

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
  _checks.check_scalar("learning_rate", learning_rate)
  _checks.check_positive("learning_rate", learning_rate)
  _checks.check_integer("num_steps", num_steps, 0, None)
  return _linearized_loss(kernel, residual, learning_rate, num_steps)


@functools.partial(jax.jit, static_argnums=3)
def _linearized_loss(
  kernel: jax.Array,
  residual: jax.Array,
  learning_rate: jax.Array,
  num_steps: int,
) -> jax.Array:
  size, dtype = math.prod(residual.shape), kernel.dtype
  kernel = kernel.astype(accumulator(dtype))
  matrix = kernel.reshape(size, size)
  eigenvalues, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
  squares = jnp.square(
    jnp.matmul(
      residual.reshape(size).astype(kernel.dtype),
      vectors,
      precision=lax.Precision.HIGHEST,
    )
  )
  rate = jnp.asarray(learning_rate, kernel.dtype)
  factor = jnp.square(1 - rate * eigenvalues)

  def step(squares: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    return squares * factor, squares.sum() / 2

  _, losses = lax.scan(step, squares, None, length=num_steps + 1)
  return losses
