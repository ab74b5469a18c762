"""Copies the figure of a finished run into the pages, at most 200 KB.

``python docs/take_figure.py attention-sparsity`` reads
``results/attention-sparsity/figure.png`` and writes
``docs/_static/attention_sparsity.png``.
"""

import pathlib
import sys

from PIL import Image

_ROOT = pathlib.Path(__file__).parents[1]
_WIDTH = 1400


def main(slug: str) -> None:
  """Scales the figure down, with a palette instead of full color."""
  source = _ROOT / "results" / slug / "figure.png"
  target = _ROOT / "docs" / "_static" / f"{slug.replace('-', '_')}.png"
  image = Image.open(source).convert("RGB")
  height = round(image.height * _WIDTH / image.width)
  image = image.resize((_WIDTH, height), Image.Resampling.LANCZOS)
  target.parent.mkdir(exist_ok=True)
  # The median cut, which is the default, merges the colors of thin lines.
  image = image.quantize(
    256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
  )
  image.save(target, optimize=True)
  print(f"wrote {target.relative_to(_ROOT)}, {target.stat().st_size} bytes")


if __name__ == "__main__":
  main(*sys.argv[1:])
