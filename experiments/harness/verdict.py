"""Verdicts: computed from checks against ranges that were fixed beforehand."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from experiments.harness import files, provenance
from experiments.harness import workdir as workdir_lib

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"


class Check(NamedTuple):
  """One measured number and the closed range in which the claim puts it.

  Attributes:
    name: what was measured, in a few words.
    measured: the number.
    low: least accepted value; minus infinity for "at most ``high``".
    high: greatest accepted value; infinity for "at least ``low``". With both
      bounds infinite the number is reported and decides nothing.
  """

  name: str
  measured: float
  low: float = -math.inf
  high: float = math.inf


class Verdict(NamedTuple):
  """What an experiment found; the content of ``summary.json``.

  Attributes:
    slug: the system.
    tier: ``smoke``, ``cpu`` or ``full``.
    claim: the claim in one sentence.
    source: the paper and the statement in it, as ``arXiv:2404.02690, Thm 4``.
    paper: the number (or statement) of the paper.
    measured: numbers by name; equal however often the run was interrupted.
    timed: the same for wall-clock measurements, which repeat only roughly.
    accepted: (low, high) by name, None where there is no bound.
    verdict: ``reproduced``, ``not reproduced`` or ``inconclusive``.
    seconds: what the run took, interruptions not counted.
    versions: of Python and the packages that compute.
    commit: git commit of the sources, ``-dirty`` if they were changed.
  """

  slug: str
  tier: str
  claim: str
  source: str
  paper: str
  measured: dict[str, float]
  timed: dict[str, float]
  accepted: dict[str, tuple[float | None, float | None]]
  verdict: str
  seconds: float
  versions: dict[str, str]
  commit: str


def decide(checks: Sequence[Check]) -> str:
  """Decides whether measurements bear out a claim.

  Args:
    checks: the measurements; those without bounds decide nothing.

  Returns:
    ``not reproduced`` if a finite number lies outside its range; otherwise
    ``inconclusive`` if a bounded number is not finite or there is none;
    otherwise ``reproduced``.

  Raises:
    ValueError: if a range is empty or NaN, or two checks share a name.

  Example:
    >>> decide([Check("slope", 0.52, 0.45, 0.55)])
    'reproduced'
    >>> decide([Check("slope", 0.52, 0.45, 0.55), Check("ratio", 2.0, 3.0)])
    'not reproduced'
    >>> decide([Check("slope", float("nan"), 0.45, 0.55)])
    'inconclusive'
  """
  _check_ranges(checks)
  bounded = [c for c in checks if _is_bounded(c)]
  finite = [c for c in bounded if math.isfinite(c.measured)]
  if any(not c.low <= c.measured <= c.high for c in finite):
    return NOT_REPRODUCED
  return REPRODUCED if bounded and finite == bounded else INCONCLUSIVE


def finish(
  workdir: workdir_lib.Workdir,
  *,
  claim: str,
  source: str,
  paper: str,
  checks: Sequence[Check],
  timed: Sequence[Check] = (),
) -> Verdict:
  """Decides and writes ``summary.json``; the last call of an experiment.

  Args:
    workdir: the run's folder.
    claim: the claim in one sentence.
    source: the paper and the statement in it.
    paper: the paper's number or statement.
    checks: measurements that repeat exactly.
    timed: wall-clock measurements, with a margin in their ranges. They need
      ``config.timed = True``: then ``experiments.reproduce`` runs nothing
      else beside this experiment.

  Returns:
    The verdict; at tier ``smoke`` always ``inconclusive``.

  Raises:
    ValueError: if ``timed`` is given without ``config.timed``, or a range is
      malformed.
  """
  config = workdir.config
  if timed and not config.get("timed", False):
    raise ValueError("timed checks need config.timed = True")
  everything = [*checks, *timed]
  decision = decide(everything)
  result = Verdict(
    slug=str(config.slug),
    tier=str(config.tier),
    claim=claim,
    source=source,
    paper=paper,
    measured={c.name: float(c.measured) for c in checks},
    timed={c.name: float(c.measured) for c in timed},
    accepted={c.name: _bounds(c) for c in everything if _is_bounded(c)},
    verdict=INCONCLUSIVE if config.tier == "smoke" else decision,
    seconds=round(workdir.save_seconds(), 1),
    versions=provenance.versions(),
    commit=provenance.commit(),
  )
  if jax.process_index() == 0:
    workdir_lib.record_sources(workdir.path)
    files.write_json(workdir.path / "summary.json", result._asdict())
  return result


def describe_range(accepted: Sequence[float | None]) -> str:
  """Writes an accepted range, None standing for no bound.

  Example:
    >>> describe_range([0.45, 0.55]), describe_range([None, 2.0])
    ('0.45 to 0.55', 'at most 2')
  """
  low, high = accepted
  if low is None:
    return f"at most {high:.4g}"
  return f"at least {low:.4g}" if high is None else f"{low:.4g} to {high:.4g}"


def _is_bounded(check: Check) -> bool:
  return math.isfinite(check.low) or math.isfinite(check.high)


def _bounds(check: Check) -> tuple[float | None, float | None]:
  low = float(check.low) if math.isfinite(check.low) else None
  return low, float(check.high) if math.isfinite(check.high) else None


def _check_ranges(checks: Sequence[Check]) -> None:
  names = [c.name for c in checks]
  for check in checks:
    if not check.low <= check.high:
      raise ValueError(
        f"check {check.name!r} must have low <= high, "
        f"got [{check.low}, {check.high}]"
      )
    if names.count(check.name) > 1:
      raise ValueError(f"two checks are called {check.name!r}")
