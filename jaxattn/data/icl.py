r"""Prompts of in-context regression, and ways in which they go wrong.

:func:`corrupt_prompt` spoils some of the examples of a clean prompt. Which ones
is drawn; they are those that differ from what went in.
"""

import functools

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.looped.icl import ICLTask as ICLTask
from jaxattn.looped.icl import sample_icl_task as sample_icl_task
from jaxattn.regression.reweighted_icl import Prompt

__all__ = ["ICLTask", "corrupt_prompt", "sample_icl_task"]

_KINDS = ("bias_some", "noise_some", "other_task", "imbalanced")


def corrupt_prompt(
  rng: jax.Array,
  prompt: Prompt,
  *,
  kind: str,
  num_corrupted: int,
  scale: float | jax.Array = 1.0,
) -> Prompt:
  r"""Spoils some examples of a prompt of linear regression.

  * ``"bias_some"``: ``scale`` is added to the label.
  * ``"noise_some"``: the label is replaced by noise, of ``scale`` times the
    root mean square of the prompt's labels.
  * ``"other_task"``: the label is that of another linear task, with
    coefficients from N(0, scale^2 I), the same for all spoiled examples.
  * ``"imbalanced"``: the input keeps its length times ``scale``, but points
    along one direction, the same for all of them. Labels stay right: they
    move by the least-squares fit of the prompt, which is the task if labels
    are free of noise and inputs span the space; of many fits the least.

  Args:
    rng: PRNG key.
    prompt: (m, d) inputs and (m,) labels.
    kind: one of the above.
    num_corrupted: examples to spoil, at most m, drawn without replacement.
    scale: what it is depends on the kind; positive.

  Returns:
    The prompt, with the other examples as they were.

  Raises:
    ValueError: if shapes, the kind or a number do not fit; for
      ``"imbalanced"`` also if m < d.

  Cost:
    O(m d), for ``"imbalanced"`` O(m d^2).

  Source:
    the corruptions are this project's; that of the labels is the "biased
    prompt" of arXiv 2310.03331.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.data import corrupt_prompt
    >>> from jaxattn.regression import Prompt
    >>> prompt = Prompt(jnp.ones((4, 2)), jnp.zeros(4))
    >>> spoiled = corrupt_prompt(
    ...   jax.random.key(0), prompt, kind="bias_some", num_corrupted=3
    ... )
    >>> print((spoiled.y != prompt.y).sum(), spoiled.y.sum())
    3 3.0
  """
  x, y = jnp.asarray(prompt.x), jnp.asarray(prompt.y)
  _checks.check_rank("prompt.x", x, 2)
  _checks.check_floating("prompt.x", x)
  _checks.check_floating("prompt.y", y)
  m, d = x.shape
  _checks.check_shape("prompt.y", y, (m,), "(m,)")
  _checks.check_choice("kind", kind, _KINDS)
  _checks.check_integer("num_corrupted", num_corrupted, 0, m)
  _checks.check_positive("scale", scale)
  if kind == "imbalanced" and m < d:
    raise ValueError(
      f"kind='imbalanced' needs as many examples as dimensions, got {m} of {d}"
    )
  return _corrupt(rng, Prompt(x, y), scale, kind, num_corrupted)


@functools.partial(jax.jit, static_argnames=("kind", "num_corrupted"))
def _corrupt(
  rng: jax.Array,
  prompt: Prompt,
  scale: float | jax.Array,
  kind: str,
  num_corrupted: int,
) -> Prompt:
  x, y = prompt
  m, d = x.shape
  scale = jnp.asarray(scale, y.dtype)
  rng_which, rng_draw = jax.random.split(rng)
  spoiled = jax.random.permutation(rng_which, m) < num_corrupted
  if kind == "imbalanced":
    direction = jax.random.normal(rng_draw, (d,), x.dtype)
    direction /= jnp.linalg.norm(direction)
    size = scale * jnp.linalg.norm(x, axis=1) * jnp.sign(x @ direction)
    moved = jnp.where(spoiled[:, None], size[:, None] * direction[None], x)
    # Not ridge_solve: inputs may all lie on a line.
    task, *_ = jnp.linalg.lstsq(x, y)
    return Prompt(moved, y + jnp.where(spoiled, (moved - x) @ task, 0))
  if kind == "bias_some":
    label = y + scale
  elif kind == "noise_some":
    size = scale * jnp.sqrt((y**2).mean())
    label = size * jax.random.normal(rng_draw, (m,), y.dtype)
  else:
    label = x @ (scale * jax.random.normal(rng_draw, (d,), x.dtype))
  return Prompt(x, jnp.where(spoiled, label, y))
