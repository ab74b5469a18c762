"""Data that needs no download: numpy in, arrays out."""

from jaxattn.data.text import byte_batches as byte_batches
from jaxattn.data.text import load_text as load_text

__all__ = ["byte_batches", "load_text"]
