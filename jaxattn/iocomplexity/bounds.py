r"""Words that no schedule can do without, up to constants.

For a cache of M words, arXiv 2402.07443 (forward) and 2410.09397 (backward):

.. math::

  \Omega\Big(\min\Big\{\frac{n^2 d^2}{M}, \frac{n^2 d}{\sqrt M}\Big\}\Big),
  \qquad
  \Omega\Big(\min\Big\{\frac{n^2 d^2 + n d^3}{M},
  \frac{n^2 d + n d^2}{\sqrt M}\Big\}\Big).
"""

import math

from jaxattn import _checks

_KINDS = ("forward", "backward", "train")


def io_lower_bound(
  kind: str,
  *,
  num_queries: int,
  num_keys: int,
  head_dim: int,
  cache_words: int,
  nnz_inputs: int | None = None,
  nnz_scores: int | None = None,
) -> float:
  r"""The lower bound of the papers, with the constant 1.

  The module's formulas, with :math:`n^2 = N_q N_k` and, in the terms of the
  products by X, :math:`n = \min(N_q, N_k)`. The proofs leave a constant open:
  ratios of counts to this number compare schedules, and say nothing of how far
  from the best one is. Where inputs are sparse, with at least Z nonzeros in
  each of them and U pairs that attend, the bound becomes
  :math:`\min\{Z^2 / M, Z \sqrt{U} / \sqrt{M}\}`.

  Args:
    kind: "forward", "backward" or "train". The bound of the last two is the
      same, for the gradient in X that "train_small" of :func:`io_count` forms;
      that of queries, keys and values lacks the terms with :math:`d^3` and
      :math:`n d^2`, which count if d is larger than n.
    num_queries: number of queries.
    num_keys: number of keys.
    head_dim: size d.
    cache_words: M.
    nnz_inputs: Z, the fewest nonzeros of any input matrix.
    nnz_scores: U, pairs that the mask leaves.

  Returns:
    The number of words.

  Raises:
    ValueError: if there is no such kind, if a size is no positive integer, if
      only one of Z and U is given or they are larger than their matrices, or
      for "train" with sparse inputs.

  Source:
    arXiv 2410.09397, abstract; 2402.07443.

  Example:
    >>> io_lower_bound(
    ...   "forward", num_queries=4096, num_keys=4096, head_dim=64,
    ...   cache_words=65536,
    ... )
    1048576.0
  """
  _checks.check_choice("kind", kind, _KINDS)
  pairs, rows = _sizes(num_queries, num_keys, head_dim)
  _checks.check_integer("cache_words", cache_words, 1, None)
  d, root = head_dim, math.sqrt(cache_words)
  if (nnz_inputs is None) != (nnz_scores is None):
    raise ValueError(
      "nnz_inputs and nnz_scores must be given together, got "
      f"{nnz_inputs} and {nnz_scores}"
    )
  if nnz_inputs is not None and nnz_scores is not None:
    if kind == "train":
      raise ValueError('there is no bound with nonzeros for kind "train"')
    _checks.check_integer("nnz_inputs", nnz_inputs, 1, rows * d)
    _checks.check_integer("nnz_scores", nnz_scores, 1, pairs)
    dense = nnz_inputs * math.sqrt(nnz_scores)
    return min(nnz_inputs**2 / cache_words, dense / root)
  more = 0 if kind == "forward" else rows * d
  return min(
    (pairs * d**2 + more * d**2) / cache_words, (pairs + more) * d / root
  )


def compulsory_words(
  kind: str, *, num_queries: int, num_keys: int, head_dim: int
) -> int:
  """Inputs and outputs: what is moved if the cache holds everything.

  Args:
    kind: "forward" (outputs and log-sum-exps), "backward" (from the outputs,
      too) or "train", as in :func:`best_algorithm`.
    num_queries: number of queries.
    num_keys: number of keys.
    head_dim: size d.

  Returns:
    The number of words.

  Raises:
    ValueError: if there is no such kind or a size is no positive integer.

  Source:
    arXiv 2410.09397.

  Example:
    >>> compulsory_words("forward", num_queries=8, num_keys=16, head_dim=4)
    200
  """
  _checks.check_choice("kind", kind, _KINDS)
  _sizes(num_queries, num_keys, head_dim)
  q, k, d = num_queries, num_keys, head_dim
  words = {
    "forward": 2 * (q + k) * d + q,
    "backward": 4 * (q + k) * d + q,
    "train": 2 * (q + k) * d + 3 * d * d,
  }
  return words[kind]


def _sizes(num_queries: int, num_keys: int, head_dim: int) -> tuple[int, int]:
  """Pairs, and rows of the shorter side."""
  _checks.check_integer("num_queries", num_queries, 1, None)
  _checks.check_integer("num_keys", num_keys, 1, None)
  _checks.check_integer("head_dim", head_dim, 1, None)
  return num_queries * num_keys, min(num_queries, num_keys)
