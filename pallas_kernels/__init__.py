"""Kernels for TPU and GPU; imports nothing of ``jaxattn``.

One folder an operation, and in each folder:

* ``config.py``: frozen, validated block sizes, as plain numbers; ReLU attention
  takes those of exact attention.
* ``operands.py``: what the pieces take: ``Operands`` (arrays), ``Options``
  (static, hashable) and ``Gradients``.
* ``reference.py``: the dense formula that every implementation must equal.
* ``mosaic_tpu.py``, and for four operations ``mosaic_gpu.py``:
  ``supports(operands, options) -> reason | None``,
  ``forward(operands, options) -> (out, residual)`` and
  ``backward(operands, options, out, residual, *cotangents) -> Gradients``.
* ``api.py``: the public function: validates, and runs the implementation that
  the caller names, with its gradient.

Kernels do not dispatch: the ``custom_vjp`` of the operation in ``jaxattn``
chooses between these pieces and the XLA path, and its residuals are common to
all of them.
"""
