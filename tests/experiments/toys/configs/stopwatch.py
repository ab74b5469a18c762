"""Configuration of the timed toy."""

import ml_collections


def get_config(tier: str = "cpu") -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {"slug": "stopwatch", "tier": tier, "timed": True}
  )
