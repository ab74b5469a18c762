r"""Recovered token vectors against the truth and against a vocabulary.

Attacks return vectors; what leaked are words. A vector :math:`t` is decoded to
the nearest row of the vocabulary, and an estimate whose rows come in no known
order is first matched to the truth by the assignment of least total
:math:`\sum_i \|\hat t_{\pi(i)} - t_i\|^2`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks

__all__ = ["decode_tokens", "match_tokens", "reconstruction_metrics"]


def decode_tokens(
  tokens: jax.Array, vocab: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""The nearest entry of a vocabulary, :math:`\arg\min_w \|t - v_w\|_2`.

  Args:
    tokens: (..., d).
    vocab: (V, d), one embedding a row.

  Returns:
    ids: (...) int32; of equally near entries the first.
    distances: (...), Euclidean, to that entry.

  Raises:
    ValueError: if shapes or dtypes do not fit, or the vocabulary is empty.

  Cost:
    2 V d flops and V numbers of memory a token.

  Source:
    a standard fact.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import decode_tokens
    >>> vocab = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> ids, distances = decode_tokens(jnp.array([[1.5, 0], [0, 3]]), vocab)
    >>> print(ids, distances)
    [1 2] [0.5 1. ]
  """
  tokens, vocab = jnp.asarray(tokens), jnp.asarray(vocab)
  _checks.check_rank("vocab", vocab, 2)
  _checks.check_floating("vocab", vocab)
  _checks.check_floating("tokens", tokens)
  if not len(vocab):
    raise ValueError(f"vocab must not be empty, got shape {vocab.shape}")
  *batch, _ = tokens.shape or (0,)
  _checks.check_shape("tokens", tokens, (*batch, vocab.shape[1]), "(..., d)")
  # |t|^2 is the same for all entries. About the mean: far from the origin the
  # squares that are left would be larger than what tells entries apart.
  center = vocab.mean(0)
  entries = vocab - center[None]
  centered = tokens - center.reshape(*([1] * len(batch)), -1)
  squares = (entries**2).sum(1).reshape(*([1] * len(batch)), -1)
  ids = (squares - 2 * (centered @ entries.T)).argmin(-1)
  # Of the difference: the expanded square would lose half the digits.
  distances = jnp.linalg.norm(tokens - vocab[ids], axis=-1)
  return ids.astype(jnp.int32), distances


def match_tokens(estimate: jax.Array, truth: jax.Array) -> np.ndarray:
  r"""The order in which the rows of an estimate fit the truth best.

  .. math:: \arg\min_\pi \sum_i \|\hat t_{\pi(i)} - t_i\|^2

  Args:
    estimate: (n, d).
    truth: (n, d).

  Returns:
    (n,) integers: ``estimate[match_tokens(estimate, truth)]`` is to be compared
    with ``truth``.

  Raises:
    ValueError: if shapes do not fit, a value is not finite, or the arrays are
      being traced: assignments are computed on the host.

  Cost:
    O(n^2 d + n^3), on the host.

  Source:
    the Hungarian method, as SciPy computes it.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import match_tokens
    >>> truth = jnp.array([[0.0, 0.0], [5.0, 5.0], [9.0, 0.0]])
    >>> print(match_tokens(truth[jnp.array([2, 0, 1])] + 0.1, truth))
    [1 2 0]
  """
  from scipy import optimize

  _check_pair(estimate, truth)
  if not (_checks.is_concrete(estimate) and _checks.is_concrete(truth)):
    raise ValueError("match_tokens works on the host and cannot be traced")
  left, right = np.asarray(estimate), np.asarray(truth)
  for name, x in (("estimate", left), ("truth", right)):
    if not np.isfinite(x).all():
      raise ValueError(f"{name} contains non-finite values")
  gap = right[:, None] - left[None]
  return optimize.linear_sum_assignment((gap**2).sum(-1))[1]


def reconstruction_metrics(
  estimate: jax.Array,
  truth: jax.Array,
  *,
  vocab: jax.Array | None = None,
  permutation: bool = False,
) -> dict[str, jax.Array]:
  r"""How well token vectors were recovered.

  .. math:: \text{rel\_error} = \frac{\|\hat T - T\|_F}{\|T\|_F}, \qquad
    \text{mse} = \frac{\|\hat T - T\|_F^2}{n d}, \qquad
    \text{psnr} = 10 \log_{10} \frac{(\max T - \min T)^2}{\text{mse}}

  A loss of zero is no recovery: several inputs may have the same observation,
  and only a comparison with the truth tells.

  Args:
    estimate: (n, d).
    truth: (n, d).
    vocab: (V, d); given, ``token_accuracy`` is the share of rows for which
      estimate and truth decode to the same entry.
    permutation: match rows first, where their order cannot be known.

  Returns:
    ``rel_error``, ``mse``, ``psnr`` in dB (infinite without an error), and with
    a vocabulary ``token_accuracy``, all ().

  Raises:
    ValueError: if shapes do not fit, or with ``permutation`` as
      :func:`match_tokens` does.

  Cost:
    O(n d), with a vocabulary O(n V d), and that of :func:`match_tokens`.

  Source:
    standard definitions.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import reconstruction_metrics
    >>> truth = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    >>> got = reconstruction_metrics(truth[::-1], truth, permutation=True)
    >>> print(got["rel_error"], got["psnr"])
    0.0 inf
  """
  estimate, truth = jnp.asarray(estimate), jnp.asarray(truth)
  _check_pair(estimate, truth)
  _checks.check_choice("permutation", permutation, (False, True))
  if permutation:
    estimate = estimate[match_tokens(estimate, truth)]
  gap = estimate - truth
  mse = (gap**2).mean()
  span = truth.max() - truth.min()
  metrics = {
    "rel_error": jnp.linalg.norm(gap) / jnp.linalg.norm(truth),
    "mse": mse,
    "psnr": 10 * jnp.log10(span**2 / mse),
  }
  if vocab is not None:
    right = decode_tokens(estimate, vocab)[0] == decode_tokens(truth, vocab)[0]
    metrics["token_accuracy"] = right.mean()
  return metrics


def _check_pair(estimate: jax.Array, truth: jax.Array) -> None:
  _checks.check_rank("truth", truth, 2)
  _checks.check_shape("estimate", estimate, jnp.shape(truth), "that of truth")
