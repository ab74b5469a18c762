"""Questions about convex bodies that programs on the host answer."""

import numpy as np
from scipy import optimize

# Eigenvalues of an exponential that tells anything differ by less than this.
_REACH = 500.0


def is_bounded(a: np.ndarray) -> bool:
  """Whether A u <= 0 for u = 0 alone: A^T y = 0 for a y > 0, and full rank."""
  d = a.shape[1]
  lengths = np.linalg.norm(a, axis=1)
  a = a[lengths > 0] / lengths[lengths > 0][:, None]
  if len(a) <= d or np.linalg.matrix_rank(a) < d:
    return False
  found = optimize.linprog(
    np.zeros(len(a)), A_eq=a.T, b_eq=np.zeros(d), bounds=(1, None)
  )
  return found.status == 0


def has_certificate(mats: np.ndarray) -> bool:
  r"""Whether sum_i u_i A_i >= 0 for u = 0 alone.

  So it is if and only if the A_i are independent and a Y > 0 is orthogonal to
  all of them. At the minimum of log tr exp(-sum_i u_i A_i), which exists if
  there is a Y, the exponential is one.
  """
  d, n, _ = mats.shape
  flat = mats.reshape(d, -1)
  flat = flat / np.maximum(np.linalg.norm(flat, axis=1), 1e-300)[:, None]
  if np.linalg.matrix_rank(flat) < d:
    return False

  def exponential(u: np.ndarray) -> tuple[float, np.ndarray]:
    values, vectors = np.linalg.eigh(-(u @ flat).reshape(n, n))
    weights = np.exp(values - values.max())
    y = (vectors * (weights / weights.sum())) @ vectors.T
    return values.max() + np.log(weights.sum()), y

  def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
    value, y = exponential(u)
    return value, -flat @ y.reshape(-1)

  # Within bounds: without a Y it runs away.
  u = optimize.minimize(
    objective,
    np.zeros(d),
    jac=True,
    method="L-BFGS-B",
    bounds=[(-_REACH, _REACH)] * d,
    options={"maxiter": 5000, "maxfun": 50_000, "gtol": 1e-10, "ftol": 0.0},
  ).x
  y = exponential(u)[1].reshape(-1)
  # What is left of the gradient is taken out: then it is a proof.
  y -= flat.T @ np.linalg.lstsq(flat @ flat.T, flat @ y)[0]
  return float(np.linalg.eigvalsh(y.reshape(n, n))[0]) > 1e-12


def extreme_points(
  eq: np.ndarray, lb: np.ndarray, ub: np.ndarray
) -> np.ndarray:
  """(2, d, d): where each coordinate is least, and largest."""
  bounds, zeros = np.column_stack([lb, ub]), np.zeros(len(eq))
  points = []
  for sign in (1.0, -1.0):
    for i, row in enumerate(np.eye(len(lb))):
      found = optimize.linprog(
        sign * row, A_eq=eq, b_eq=zeros, bounds=bounds, method="highs"
      )
      if found.status in (2, 4):
        raise ValueError("polytope is empty: no x with eq x = 0, lb <= x <= ub")
      if found.status == 3:
        raise ValueError(f"polytope is unbounded in coordinate {i}")
      if found.status != 0:
        raise ValueError(f"the linear program of x[{i}]: {found.message}")
      points.append(found.x)
  return np.stack(points).reshape(2, len(lb), len(lb))


def irredundant(a: np.ndarray, b: np.ndarray, size: float) -> np.ndarray:
  """Which rows no others imply; of equal ones the last."""
  keep = np.ones(len(a), bool)
  for i, row in enumerate(a):
    keep[i] = False
    # With the row itself a little further out the program is bounded.
    found = optimize.linprog(
      -row,
      A_ub=np.concatenate([a[keep], row[None]]),
      b_ub=np.append(b[keep], b[i] + 1 + abs(b[i])),
      bounds=(None, None),
      method="highs",
    )
    keep[i] = not (found.status == 0 and -found.fun <= b[i] + size)
  return keep
