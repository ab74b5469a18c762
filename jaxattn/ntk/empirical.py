r"""Tangent kernels of models as they are, at finite width.

For outputs :math:`f_a(x; \theta)`, :math:`a < O`, of any differentiable model,

.. math::

  H[i, a, j, b] = \sum_p \frac{\partial f_a(x_i)}{\partial \theta_p}
                         \frac{\partial f_b(x_j)}{\partial \theta_p},

an (n1, O, n2, O) array; flattened it is always (i, a) by (j, b). Four ways to
it:

* :func:`empirical_ntk`, ``method="jacobian"``: derivatives of each example
  alone, contracted. For any model.
* :func:`empirical_ntk`, ``method="ntvp"``: never holds two gradients. For one
  output and very many parameters.
* :func:`jaxattn.ntk.structured_ntk`: from the inputs of dense layers and the
  derivatives by their outputs, never a gradient. For models that tell these;
  the fastest.
* :func:`sketched_ntk`: random directions in parameter space. For whatever is
  too large for the others.

A batch must be nothing but its examples: a model that mixes them (batch
normalization) has no kernel. Source: Jacot et al., arXiv 1806.07572; Novak et
al., arXiv 2206.08720.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import _blocks
from jaxattn.ntk._blocks import Apply
from jaxattn.numerics._dtypes import accumulator

_METHODS = ("jacobian", "ntvp")
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def empirical_ntk(
  apply_fn: Apply,
  params: Any,
  x1: Any,
  x2: Any = None,
  *,
  method: str = "jacobian",
  chunk_size: int | None = None,
  trace: bool = False,
) -> jax.Array:
  """Tangent kernel of any model.

  Args:
    apply_fn: ``(params, x) -> (n, O)``. Hashed: the same function object does
      not compile again (``model.apply`` of a flax module is one; a lambda that
      is written anew at each call is not).
    params: any pytree of floating arrays.
    x1: (n1, ...) data, or a pytree of such arrays.
    x2: (n2, ...) data; None = ``x1``.
    method: ``"jacobian"`` or ``"ntvp"``, see the module. ``"ntvp"`` needs
      forward mode, which a ``custom_vjp`` does not offer, and sums in the dtype
      of the parameters, 16 bits too.
    chunk_size: most examples visited at a time; memory only. None = as many as
      hold 512 MiB of derivatives, with ``"ntvp"`` all. A kernel of ``x1`` with
      itself visits half of the pairs of chunks.
    trace: return the mean over outputs, (n1, n2).

  Returns:
    (n1, O, n2, O), or (n1, n2) with ``trace``, of the dtype of the outputs.

  Raises:
    ValueError: if ``method`` is unknown, there are no parameters or one is not
      floating, ``x1`` and ``x2`` differ beyond their first axis, ``apply_fn``
      does not return (n, O), or ``chunk_size`` < 1.

  Cost:
    With P parameters, F for one forward pass of one example and c =
    min(n, chunk_size). ``"jacobian"``: n1 n2 O^2 P time, half of it without
    ``x2``, and (1 + n2 / c) n1 O F, as derivatives of a chunk of columns are
    taken for each chunk of rows; 2 c O P memory, half of it if there is but one
    chunk. ``"ntvp"``: n1 n2 O F time; P and the activations of c examples.

  Source:
    arXiv 1806.07572; arXiv 2206.08720, sections 3.1 and 3.2.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import empirical_ntk
    >>> def linear(params, x):
    ...   return x @ params["w"] + params["b"]
    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros((1, 1))}
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> print(empirical_ntk(linear, params, x)[:, 0, :, 0])
    [[2. 2.]
     [2. 6.]]
  """
  if method not in _METHODS:
    raise ValueError(
      f"method must be one of {', '.join(map(repr, _METHODS))}, got "
      f"{method!r}; structured_ntk and sketched_ntk are functions of their own"
    )
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _empirical_ntk(apply_fn, params, x1, x2, method, chunk_size, trace)


def sketched_ntk(
  rng: jax.Array,
  apply_fn: Apply,
  params: Any,
  x1: Any,
  x2: Any = None,
  *,
  num_vectors: int = 256,
) -> jax.Array:
  r"""Unbiased estimate of the tangent kernel from random directions.

  With Gaussian :math:`v_s` in parameter space and the Jacobian J,

  .. math:: H \approx \frac1S \sum_{s \le S} (J v_s) (J' v_s)^\top .

  The standard deviation of an entry is at most :math:`\sqrt{2 / S}` times the
  root of the product of its two diagonal entries.

  Args:
    rng: key.
    apply_fn: as in :func:`empirical_ntk`; it needs forward mode, which a
      ``custom_vjp`` does not offer.
    params: any pytree of floating arrays.
    x1: (n1, ...) data, or a pytree of such arrays.
    x2: (n2, ...) data; None = ``x1``.
    num_vectors: S.

  Returns:
    (n1, O, n2, O).

  Raises:
    ValueError: if ``x1`` and ``x2`` differ beyond their first axis,
      ``apply_fn`` does not return (n, O), there are no parameters or one is
      not floating, or ``num_vectors`` < 1.

  Cost:
    S forward passes over all data and S n1 n2 O^2 time; P, the activations of
    all data and S n O memory.

  Source:
    Johnson and Lindenstrauss's lemma; this project.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxattn.ntk import sketched_ntk
    >>> def linear(params, x):
    ...   return x @ params
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> ntk = sketched_ntk(jax.random.key(0), linear, jnp.ones((2, 1)), x)
    >>> bool(abs(ntk[1, 0, 1, 0] - 4.0) < 1.5)
    True
  """
  _checks.check_integer("num_vectors", num_vectors, 1, None)
  return _sketched_ntk(rng, apply_fn, params, x1, x2, num_vectors)


def ntk_vector_product(
  apply_fn: Apply, params: Any, x: Any, v: jax.Array
) -> jax.Array:
  """The tangent kernel times a vector, without the kernel.

  One reverse and one forward sweep: for conjugate gradients, power iteration
  or descent where n O is too large for a matrix.

  Args:
    apply_fn: as in :func:`empirical_ntk`; it needs forward mode, which a
      ``custom_vjp`` does not offer.
    params: any pytree of floating arrays.
    x: (n, ...) data, or a pytree of such arrays.
    v: (n, O).

  Returns:
    (n, O), sum over j, b of H[i, a, j, b] v[j, b].

  Raises:
    ValueError: if ``apply_fn`` does not return (n, O), ``v`` is not like that,
      there are no parameters, or one is not floating.

  Cost:
    About five forward passes over the data; P + activations in memory.

  Source:
    arXiv 2206.08720, section 3.2.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import ntk_vector_product
    >>> def linear(params, x):
    ...   return x @ params
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> print(ntk_vector_product(linear, jnp.ones((2, 1)), x, jnp.ones((2, 1))))
    [[2.]
     [6.]]
  """
  return _ntk_vector_product(apply_fn, params, x, v)


# --- programs; their arguments are checked where they are traced: once ---


def _check_params(params: Any) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  if not leaves:
    raise ValueError(f"params must hold at least one array, got {params}")
  for path, leaf in leaves:
    _checks.check_floating(f"params{jax.tree_util.keystr(path)}", leaf)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _empirical_ntk(
  apply_fn: Apply,
  params: Any,
  x1: Any,
  x2: Any,
  method: str,
  chunk_size: int | None,
  trace: bool,
) -> jax.Array:
  x1, x2 = _blocks.check_data(x1, x2)
  _check_params(params)
  out = _blocks.check_output(apply_fn, params, x1)
  if method == "ntvp":
    fn = functools.partial(_by_products, apply_fn, params, trace)
    chunk_size = chunk_size or _blocks.num_data(x1)
    return _blocks.blocked_gram(fn, x1, x2, chunk_size=chunk_size)
  prepare = functools.partial(_jacobians, apply_fn, params)
  fn = functools.partial(_contract, out.dtype, trace)
  if chunk_size is None:
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    chunk_size = _blocks.largest_chunk(out.shape[1] * nbytes)
  return _blocks.gram_of(prepare, fn, x1, x2, chunk_size)


def _jacobians(apply_fn: Apply, params: Any, x: Any) -> list[jax.Array]:
  """(n, O, size) of each leaf, taken for each example alone."""

  def of_one(params: Any, x: Any) -> jax.Array:
    return apply_fn(params, jax.tree.map(lambda y: y[None], x))[0]

  leaves = jax.tree.leaves(
    jax.vmap(jax.jacrev(of_one), in_axes=(None, 0))(params, x)
  )
  return [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]


def _contract(
  dtype: Any, trace: bool, jacobian1: list[jax.Array], jacobian2: Any
) -> jax.Array:
  n1, num_outputs, _ = jacobian1[0].shape
  lead = 1 if trace else 2
  total = sum(
    _blocks.inner_products(a, b, lead) for a, b in zip(jacobian1, jacobian2)
  )
  total = jnp.asarray(total)
  if trace:
    return (total / num_outputs).astype(dtype)
  return total.reshape(n1, num_outputs, -1, num_outputs).astype(dtype)


def _by_products(
  apply_fn: Apply, params: Any, trace: bool, x1: Any, x2: Any
) -> jax.Array:
  """Pulls each output back to the parameters and pushes that forward."""
  f1 = functools.partial(_swap(apply_fn), x1)
  num_outputs = jax.eval_shape(f1, params).shape[1]

  def column(index: tuple[jax.Array, jax.Array]) -> jax.Array:
    j, b = index
    row = jax.tree.map(lambda x: x[j][None], x2)
    out, pull = jax.vjp(functools.partial(_swap(apply_fn), row), params)
    (gradient,) = pull(jax.nn.one_hot(b, num_outputs, dtype=out.dtype)[None])
    return jax.jvp(f1, (params,), (gradient,))[1]

  n2 = _blocks.num_data(x2)
  grid = jnp.indices((n2, num_outputs)).reshape(2, -1)
  columns = lax.map(column, (grid[0], grid[1]))
  kernel = columns.reshape(n2, num_outputs, -1, num_outputs)
  kernel = jnp.transpose(kernel, (2, 3, 0, 1))
  return _einsum("iaja->ij", kernel) / num_outputs if trace else kernel


def _swap(apply_fn: Apply) -> Apply:
  return lambda x, params: apply_fn(params, x)


@functools.partial(jax.jit, static_argnums=(1, 5))
def _sketched_ntk(
  rng: jax.Array,
  apply_fn: Apply,
  params: Any,
  x1: Any,
  x2: Any,
  num_vectors: int,
) -> jax.Array:
  x1, x2 = _blocks.check_data(x1, x2)
  _check_params(params)
  out = _blocks.check_output(apply_fn, params, x1)
  leaves, tree = jax.tree.flatten(params)
  both = [x1] if x2 is None else [x1, x2]

  def push(rng: jax.Array) -> list[jax.Array]:
    keys = jax.random.split(rng, len(leaves))
    # Normal draws of 16 bits have a mean that is not 0: it adds up.
    vector = tree.unflatten(
      jax.random.normal(key, leaf.shape, accumulator(leaf.dtype)).astype(
        leaf.dtype
      )
      for key, leaf in zip(keys, leaves)
    )
    return [
      jax.jvp(functools.partial(_swap(apply_fn), x), (params,), (vector,))[1]
      for x in both
    ]

  pushed = lax.map(push, jax.random.split(rng, num_vectors))
  kernel = _einsum(
    "sia,sjb->iajb",
    pushed[0],
    pushed[-1],
    preferred_element_type=accumulator(out.dtype),
  )
  return (kernel / num_vectors).astype(out.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _ntk_vector_product(
  apply_fn: Apply, params: Any, x: Any, v: jax.Array
) -> jax.Array:
  x, _ = _blocks.check_data(x, None, "x")
  _check_params(params)
  out = _blocks.check_output(apply_fn, params, x)
  _checks.check_shape("v", v, out.shape, "(n, O)")
  f = functools.partial(_swap(apply_fn), x)
  _, pull = jax.vjp(f, params)
  return jax.jvp(f, (params,), pull(v.astype(out.dtype)))[1]
