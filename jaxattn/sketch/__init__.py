"""Sketches: random maps to fewer dimensions that keep inner products."""

from jaxattn.sketch.tensor import PolySketch as PolySketch
from jaxattn.sketch.tensor import TensorSketch as TensorSketch
from jaxattn.sketch.tensor import poly_sketch_apply as poly_sketch_apply
from jaxattn.sketch.tensor import poly_sketch_init as poly_sketch_init
from jaxattn.sketch.tensor import tensor_sketch_apply as tensor_sketch_apply
from jaxattn.sketch.tensor import tensor_sketch_init as tensor_sketch_init

__all__ = [
  "PolySketch",
  "TensorSketch",
  "poly_sketch_apply",
  "poly_sketch_init",
  "tensor_sketch_apply",
  "tensor_sketch_init",
]
