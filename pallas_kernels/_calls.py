"""One call of an operation, by the implementation that it names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def differentiable(
  reference: Callable[..., Any],
  kernels: Mapping[str, Any],
  fields: tuple[str, ...],
  *,
  outputs: int = 2,
) -> Callable[..., Any]:
  """``attend(implementation, options, x)``, with its gradient.

  Args:
    reference: ``reference(x, options)``, what the forward pass returns.
    kernels: by name, modules of ``supports``, ``forward`` and ``backward``; the
      first one's are what is interpreted.
    fields: of the operands ``x`` that have a gradient.
    outputs: how many of the results, from the first on, have a cotangent.

  Returns:
    A function that raises NotImplementedError if the kernels that are named
    cannot take the operands.
  """
  first = next(iter(kernels.values()))

  def forward(implementation: str, options: Any, x: Any) -> Any:
    if implementation == "reference":
      return reference(x, options)
    module = kernels.get(implementation, first)
    interpret = implementation == "interpret"
    return module.forward(x, options, interpret=interpret)

  def output(implementation: str, options: Any, x: Any) -> Any:
    return tuple(forward(implementation, options, x)[:outputs])

  call: Any = jax.custom_vjp(output, nondiff_argnums=(0, 1))

  def call_fwd(implementation: str, options: Any, x: Any) -> Any:
    results = forward(implementation, options, x)
    return tuple(results[:outputs]), (x, results)

  def call_bwd(
    implementation: str, options: Any, residuals: Any, bars: Any
  ) -> tuple[Any]:
    x, results = residuals
    if implementation == "reference":

      def dense(*arrays: Any) -> Any:
        y = x._replace(**dict(zip(fields, arrays, strict=True)))
        return tuple(reference(y, options)[:outputs])

      _, vjp = jax.vjp(dense, *(getattr(x, name) for name in fields))
      found = vjp(bars)
    else:
      module = kernels.get(implementation, first)
      interpret = implementation == "interpret"
      bar = module.backward(x, options, *results, *bars, interpret=interpret)
      found = (getattr(bar, name) for name in fields)
    nothing = x._replace(**dict.fromkeys(x._fields))
    return (nothing._replace(**dict(zip(fields, found, strict=True))),)

  call.defvjp(call_fwd, call_bwd)

  def attend(implementation: str, options: Any, x: Any) -> Any:
    module = kernels.get(implementation)
    if module is not None and (reason := module.supports(x, options)):
      raise NotImplementedError(reason)
    return call(implementation, options, x)

  return attend
