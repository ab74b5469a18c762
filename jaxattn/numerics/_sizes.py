"""How sizes are cut into equal parts."""


def largest_divisor(n: int, at_most: int) -> int:
  """The largest divisor of ``n`` that is no larger than ``at_most``, or 1."""
  return max(d for d in range(1, max(1, min(n, at_most)) + 1) if n % d == 0)
