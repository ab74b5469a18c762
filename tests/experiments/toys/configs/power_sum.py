"""Configuration of the toy sweep."""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "slug": "power-sum",
      "tier": tier,
      "lengths": (256, 512, 1024, 2048, 4096, 8192),
      "pause": 0.0,
      "label": "squares",
      "draw": True,
      "accepted": {"slope": (2.98, 3.02)},
    }
  )
