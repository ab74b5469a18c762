"""The theory of attention as JAX functions: every theorem runs.

Subpackages load on first use, so ``import jaxattn`` costs what ``import jax``
costs:

* :mod:`jaxattn.attention`: exact, top-k and later approximate attention.
* :mod:`jaxattn.features`: polynomial and other feature maps, their moments.
* :mod:`jaxattn.regression`: regression and inversion problems of attention.
* :mod:`jaxattn.sampling`: walks in convex bodies, chains, diagnostics.
* :mod:`jaxattn.iocomplexity`: words that attention moves through a cache.
* :mod:`jaxattn.newton`: damped, sampled Newton methods for them.
* :mod:`jaxattn.softmax`: online softmax, the machinery under exact attention.
* :mod:`jaxattn.sketch`: sketches of vectors and of their tensor powers.
* :mod:`jaxattn.privacy`: calibrated noise and private gradients.
* :mod:`jaxattn.sampling`: samplers and Gaussian mixtures as their oracle.
* :mod:`jaxattn.looped`: tasks of in-context learning.
* :mod:`jaxattn.ntk`: tangent kernels and their predictions.
* :mod:`jaxattn.scaling`: slopes and other statistics of sweeps.
* :mod:`jaxattn.numerics`: selection and other numerical helpers.
* :mod:`jaxattn.models`: flax models and adapters (extra ``models``).
* :mod:`jaxattn.data`: text that ships with Python.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

__all__ = [
  "__version__",
  "attention",
  "data",
  "features",
  "iocomplexity",
  "looped",
  "models",
  "newton",
  "ntk",
  "numerics",
  "privacy",
  "regression",
  "sampling",
  "scaling",
  "sketch",
  "softmax",
]


def __getattr__(name: str) -> ModuleType:
  if name in __all__:
    return importlib.import_module(f"jaxattn.{name}")
  raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(__all__)
