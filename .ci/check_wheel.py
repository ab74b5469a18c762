"""Checks what a wheel holds, and that it works with core dependencies alone.

``python -I check_wheel.py WHEEL SOURCE`` from a folder that is not the clone.
"""

import importlib
import pathlib
import sys
import zipfile

PACKAGES = ("jaxattn", "pallas_kernels")


def check_contents(wheel: str, source: pathlib.Path) -> None:
  """The wheel holds the files of the two packages, and no others."""
  held = set(zipfile.ZipFile(wheel).namelist())
  held = {name for name in held if ".dist-info/" not in name}
  wanted = {
    path.relative_to(source).as_posix()
    for package in PACKAGES
    for path in (source / package).rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
  }
  if held != wanted:
    sys.exit(
      f"the wheel lacks {sorted(wanted - held)} and should not hold "
      f"{sorted(held - wanted)}"
    )
  print(f"{pathlib.Path(wheel).name} holds {len(held)} files of {PACKAGES}")


def check_imports() -> None:
  """Each subpackage imports; the one that needs flax says so."""
  import jaxattn

  for name in sorted(set(jaxattn.__all__) - {"__version__", "models"}):
    importlib.import_module(f"jaxattn.{name}")
  try:
    importlib.import_module("jaxattn.models")
  except ImportError as error:
    if "jaxattn[models]" not in str(error):
      raise
  else:
    sys.exit("flax is installed: this environment is not an empty one")
  print(f"jaxattn {jaxattn.__version__} imports from {jaxattn.__path__[0]}")


def check_example() -> None:
  """Three lines of attention."""
  import jax

  from jaxattn.attention import softmax_attention

  query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 300, 4, 16))
  out = softmax_attention(query, key, value, is_causal=True)
  print(
    f"attention returns {out.shape} {out.dtype}, first {out[0, 0, 0, 0]:.4f}"
  )


if __name__ == "__main__":
  check_contents(sys.argv[1], pathlib.Path(sys.argv[2]))
  check_imports()
  check_example()
