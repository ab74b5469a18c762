"""The one place for Pallas names that move between JAX releases.

Kernels import Pallas from here, so that a renamed symbol is mended once. This
is the twin of ``jaxattn/_compat.py``: kernels import nothing of ``jaxattn``.
"""

from jax.experimental import pallas as pl

__all__ = ["pl"]
