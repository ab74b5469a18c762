"""Sketches: random maps to fewer dimensions or rows that keep products."""

from jaxattn.sketch.count_sketch import (
  count_sketch_recover as count_sketch_recover,
)
from jaxattn.sketch.count_sketch import count_sketch_rows as count_sketch_rows
from jaxattn.sketch.count_sketch import count_sketch_table as count_sketch_table
from jaxattn.sketch.hadamard import fwht as fwht
from jaxattn.sketch.hadamard import pad_to_pow2 as pad_to_pow2
from jaxattn.sketch.kronecker import face_splitting as face_splitting
from jaxattn.sketch.kronecker import khatri_rao as khatri_rao
from jaxattn.sketch.leverage import (
  hadamard_square_matvec as hadamard_square_matvec,
)
from jaxattn.sketch.leverage import leverage_scores as leverage_scores
from jaxattn.sketch.rows import chernoff_rows as chernoff_rows
from jaxattn.sketch.rows import row_sample as row_sample
from jaxattn.sketch.rows import row_sample_poisson as row_sample_poisson
from jaxattn.sketch.tensor import PolySketch as PolySketch
from jaxattn.sketch.tensor import TensorSketch as TensorSketch
from jaxattn.sketch.tensor import poly_sketch_apply as poly_sketch_apply
from jaxattn.sketch.tensor import poly_sketch_init as poly_sketch_init
from jaxattn.sketch.tensor import tensor_sketch_apply as tensor_sketch_apply
from jaxattn.sketch.tensor import tensor_sketch_init as tensor_sketch_init
from jaxattn.sketch.tensor import tensor_srht_factors as tensor_srht_factors
from jaxattn.sketch.tensor import tensor_srht_rows as tensor_srht_rows

__all__ = [
  "PolySketch",
  "TensorSketch",
  "chernoff_rows",
  "count_sketch_recover",
  "count_sketch_rows",
  "count_sketch_table",
  "face_splitting",
  "fwht",
  "hadamard_square_matvec",
  "khatri_rao",
  "leverage_scores",
  "pad_to_pow2",
  "poly_sketch_apply",
  "poly_sketch_init",
  "row_sample",
  "row_sample_poisson",
  "tensor_sketch_apply",
  "tensor_sketch_init",
  "tensor_srht_factors",
  "tensor_srht_rows",
]
