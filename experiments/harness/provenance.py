"""Where a result comes from: versions, commit, machine and source files."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import jaxattn

ROOT = pathlib.Path(__file__).resolve().parents[2]

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "optax", "flax")


def versions() -> dict[str, str]:
  """Returns the versions of Python, jaxattn and what computes for it."""
  found = {"python": platform.python_version(), "jaxattn": jaxattn.__version__}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str:
  """Returns the git commit, ``-dirty`` if tracked files were changed."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    result = subprocess.run(
      [*command, "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
  except FileNotFoundError:  # there is no git on this machine
    return "unknown"
  return result.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
  """Describes the machine and the settings that a run was made with."""
  devices = jax.devices()
  return {
    "platform": platform.platform(),
    "cpu_count": os.cpu_count(),
    "backend": jax.default_backend(),
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "num_processes": jax.process_count(),
    "enable_x64": bool(jax.config.read("jax_enable_x64")),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "commit": commit(),
    "versions": versions(),
    "sources": source_hashes(),
  }


def source_hashes() -> dict[str, str]:
  """Hashes the project's modules that this process has imported.

  Returns:
    SHA-256 by path relative to the clone: what a result depends on, as in a
    compiler's dependency file, so an unrelated edit makes nothing stale.
  """
  paths = {
    pathlib.Path(file).resolve()
    for module in list(sys.modules.values())
    if (file := getattr(module, "__file__", None))
  }
  ours = {p.relative_to(ROOT) for p in paths if p.is_relative_to(ROOT)}
  return {
    p.as_posix(): _hash(ROOT / p)
    for p in sorted(ours)
    # Virtual environments live in the clone: .venv, .venv-bench, ...
    if not p.parts[0].startswith(".") and p.suffix == ".py"
  }


def changes_since(recorded: dict[str, Any]) -> list[str]:
  """Lists what would make a run differ from one recorded earlier.

  Args:
    recorded: what :func:`environment` returned then.

  Returns:
    Names of changed source files and of JAX packages whose version changed;
    empty if the results still stand.
  """
  now = versions()
  packages = [
    f"{name} {recorded['versions'].get(name)} -> {now.get(name)}"
    for name in ("jax", "jaxlib")
    if recorded["versions"].get(name) != now.get(name)
  ]
  sources = [
    path
    for path, digest in recorded["sources"].items()
    if _hash(ROOT / path) != digest
  ]
  return packages + sources


def _hash(path: pathlib.Path) -> str:
  if not path.is_file():
    return "missing"
  return hashlib.sha256(path.read_bytes()).hexdigest()
