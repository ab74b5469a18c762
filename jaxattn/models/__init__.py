"""flax models, and adapters that put any attention into a flax module."""

try:
  import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
  raise ImportError(
    "jaxattn.models needs flax: pip install 'jaxattn[models]'"
  ) from error

from jaxattn.models.adapters import attention_fn as attention_fn
from jaxattn.models.minilm import MiniLMOutput as MiniLMOutput
from jaxattn.models.minilm import load_minilm as load_minilm
from jaxattn.models.minilm import minilm_apply as minilm_apply
from jaxattn.models.minilm import minilm_tokenize as minilm_tokenize

__all__ = [
  "MiniLMOutput",
  "attention_fn",
  "load_minilm",
  "minilm_apply",
  "minilm_tokenize",
]
