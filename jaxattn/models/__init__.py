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
from jaxattn.models.classifier import AttentionClassifier as AttentionClassifier
from jaxattn.models.classifier import PooledRegressor as PooledRegressor
from jaxattn.models.dit import DiT as DiT
from jaxattn.models.dit import HistoryCache as HistoryCache
from jaxattn.models.dit import encode_history as encode_history
from jaxattn.models.flow_forecast import FlowHistory as FlowHistory
from jaxattn.models.flow_forecast import FlowMLP as FlowMLP
from jaxattn.models.flow_forecast import normalize_windows as normalize_windows
from jaxattn.models.flow_forecast import sample_forecast as sample_forecast
from jaxattn.models.flow_forecast import train_flow as train_flow
from jaxattn.models.forecast import AttentionForecaster as AttentionForecaster
from jaxattn.models.forecast import nlinear_fit as nlinear_fit
from jaxattn.models.forecast import nlinear_predict as nlinear_predict
from jaxattn.models.forecast import persistence as persistence
from jaxattn.models.forecast import (
  residual_linear_apply as residual_linear_apply,
)
from jaxattn.models.forecast import residual_linear_fit as residual_linear_fit
from jaxattn.models.forecast import seasonal_naive as seasonal_naive
from jaxattn.models.gnn import GNNHistory as GNNHistory
from jaxattn.models.gnn import GNNParams as GNNParams
from jaxattn.models.gnn import gnn_apply as gnn_apply
from jaxattn.models.gnn import gnn_init as gnn_init
from jaxattn.models.gnn import gnn_with_taps as gnn_with_taps
from jaxattn.models.gnn import train_gnn as train_gnn
from jaxattn.models.hopfield import HopfieldLayer as HopfieldLayer
from jaxattn.models.hopfield import HopfieldLookup as HopfieldLookup
from jaxattn.models.hopfield import HopfieldPooling as HopfieldPooling
from jaxattn.models.icl import ICLHistory as ICLHistory
from jaxattn.models.icl import ICLRegressor as ICLRegressor
from jaxattn.models.icl import train_icl as train_icl
from jaxattn.models.leakage import LeakageBlock as LeakageBlock
from jaxattn.models.minilm import MiniLMOutput as MiniLMOutput
from jaxattn.models.minilm import load_minilm as load_minilm
from jaxattn.models.minilm import minilm_apply as minilm_apply
from jaxattn.models.minilm import minilm_tokenize as minilm_tokenize
from jaxattn.models.mlp import MLP as MLP
from jaxattn.models.mlp import mlp_with_taps as mlp_with_taps
from jaxattn.models.modular import ModularTransformer as ModularTransformer
from jaxattn.models.modular import PolyHistory as PolyHistory
from jaxattn.models.modular import attention_matrices as attention_matrices
from jaxattn.models.modular import fourier2d_share as fourier2d_share
from jaxattn.models.modular import train_poly_net as train_poly_net
from jaxattn.models.prefix import NTKAttention as NTKAttention
from jaxattn.models.scalar_attention import (
  scalar_attention_apply as scalar_attention_apply,
)
from jaxattn.models.scalar_attention import (
  scalar_attention_grad as scalar_attention_grad,
)
from jaxattn.models.scalar_attention import (
  scalar_attention_init as scalar_attention_init,
)
from jaxattn.models.scalar_attention import (
  scalar_attention_ntk as scalar_attention_ntk,
)
from jaxattn.models.scalar_training import (
  ScalarAttentionHistory as ScalarAttentionHistory,
)
from jaxattn.models.scalar_training import (
  train_scalar_attention as train_scalar_attention,
)
from jaxattn.models.separation import (
  separation_false_positive as separation_false_positive,
)
from jaxattn.models.separation import separation_network as separation_network
from jaxattn.models.separation import (
  separation_transition as separation_transition,
)
from jaxattn.models.separation import separation_weight as separation_weight
from jaxattn.models.tensor import TensorAttention as TensorAttention
from jaxattn.models.transformer import Transformer as Transformer
from jaxattn.models.transformer import TransformerConfig as TransformerConfig
from jaxattn.models.transformer import TransformerStats as TransformerStats

__all__ = [
  "MLP",
  "AttentionClassifier",
  "AttentionForecaster",
  "DiT",
  "FlowHistory",
  "FlowMLP",
  "GNNHistory",
  "GNNParams",
  "GradientError",
  "HistoryCache",
  "HopfieldLayer",
  "HopfieldLookup",
  "HopfieldPooling",
  "ICLHistory",
  "ICLRegressor",
  "LeakageBlock",
  "MiniLMOutput",
  "ModularTransformer",
  "NTKAttention",
  "PolyHistory",
  "PooledRegressor",
  "ScalarAttentionHistory",
  "TensorAttention",
  "Transformer",
  "TransformerConfig",
  "TransformerStats",
  "attention_fn",
  "attention_matrices",
  "encode_history",
  "fourier2d_share",
  "gnn_apply",
  "gnn_init",
  "gnn_with_taps",
  "gradient_error",
  "load_minilm",
  "minilm_apply",
  "minilm_tokenize",
  "mlp_with_taps",
  "nlinear_fit",
  "nlinear_predict",
  "normalize_windows",
  "persistence",
  "residual_linear_apply",
  "residual_linear_fit",
  "sample_forecast",
  "scalar_attention_apply",
  "scalar_attention_grad",
  "scalar_attention_init",
  "scalar_attention_ntk",
  "seasonal_naive",
  "separation_false_positive",
  "separation_network",
  "separation_transition",
  "separation_weight",
  "train_flow",
  "train_gnn",
  "train_icl",
  "train_poly_net",
  "train_scalar_attention",
]
