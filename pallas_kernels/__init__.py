"""Kernels for TPU and GPU; imports nothing of ``jaxattn``.

One folder an operation, and in each folder:

* ``config.py``: frozen, validated block sizes, as plain numbers.
* ``reference.py``: the dense formula that every implementation must equal.
* ``mosaic_tpu.py``, ``mosaic_gpu.py``: forward and gradient pieces.
* ``api.py``: validates, and says ``supports(shapes, dtypes) -> reason | None``.

Kernels do not dispatch: the ``custom_vjp`` of the operation in ``jaxattn``
chooses between them and the XLA path. Today ``flash_attention`` holds the block
sizes that the XLA path uses; its kernels come later.
"""
