"""flax models, and adapters that put any attention into a flax module."""

try:
  import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
  raise ImportError(
    "jaxattn.models needs flax: pip install 'jaxattn[models]'"
  ) from error

from jaxattn.models._gradient_error import GradientError as GradientError
from jaxattn.models._gradient_error import gradient_error as gradient_error
from jaxattn.models.adapters import attention_fn as attention_fn
from jaxattn.models.classifier import (
  AttentionClassifier as AttentionClassifier,
)
from jaxattn.models.classifier import PooledRegressor as PooledRegressor
from jaxattn.models.icl import ICLHistory as ICLHistory
from jaxattn.models.icl import ICLRegressor as ICLRegressor
from jaxattn.models.icl import train_icl as train_icl
from jaxattn.models.leakage import LeakageBlock as LeakageBlock
from jaxattn.models.minilm import MiniLMOutput as MiniLMOutput
from jaxattn.models.minilm import load_minilm as load_minilm
from jaxattn.models.minilm import minilm_apply as minilm_apply
from jaxattn.models.minilm import minilm_tokenize as minilm_tokenize
from jaxattn.models.prefix import NTKAttention as NTKAttention
from jaxattn.models.separation import (
  separation_false_positive as separation_false_positive,
)
from jaxattn.models.separation import separation_network as separation_network
from jaxattn.models.separation import (
  separation_transition as separation_transition,
)
from jaxattn.models.separation import separation_weight as separation_weight
from jaxattn.models.transformer import Transformer as Transformer
from jaxattn.models.transformer import TransformerConfig as TransformerConfig
from jaxattn.models.transformer import TransformerStats as TransformerStats

__all__ = [
  "AttentionClassifier",
  "GradientError",
  "ICLHistory",
  "ICLRegressor",
  "LeakageBlock",
  "MiniLMOutput",
  "NTKAttention",
  "PooledRegressor",
  "Transformer",
  "TransformerConfig",
  "TransformerStats",
  "attention_fn",
  "gradient_error",
  "load_minilm",
  "minilm_apply",
  "minilm_tokenize",
  "separation_false_positive",
  "separation_network",
  "separation_transition",
  "separation_weight",
  "train_icl",
]
