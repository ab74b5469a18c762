"""Regression problems of attention theory, one module each.

``prepare``, ``predict``, ``loss``, ``value_and_grad``, ``curvature``,
``gauss_newton`` and ``problem`` have the same names in all modules: use them
through theirs, as ``softmax_resnet.loss``.
"""

from jaxattn.regression import softmax_resnet as softmax_resnet
from jaxattn.regression import two_layer as two_layer
from jaxattn.regression.softmax_resnet import (
  SoftmaxResnetData as SoftmaxResnetData,
)
from jaxattn.regression.softmax_resnet import (
  fit_softmax_resnet as fit_softmax_resnet,
)
from jaxattn.regression.softmax_resnet import log_alpha as log_alpha
from jaxattn.regression.two_layer import TwoLayerData as TwoLayerData
from jaxattn.regression.two_layer import active_set as active_set
from jaxattn.regression.two_layer import fit_two_layer as fit_two_layer
from jaxattn.regression.two_layer import kink_margin as kink_margin

__all__ = [
  "SoftmaxResnetData",
  "TwoLayerData",
  "active_set",
  "fit_softmax_resnet",
  "fit_two_layer",
  "kink_margin",
  "log_alpha",
  "softmax_resnet",
  "two_layer",
]
