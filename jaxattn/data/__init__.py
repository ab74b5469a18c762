"""Data that needs no download: numpy in, arrays out."""

from jaxattn.data.icl import ICLTask as ICLTask
from jaxattn.data.icl import corrupt_prompt as corrupt_prompt
from jaxattn.data.icl import sample_icl_task as sample_icl_task
from jaxattn.data.separation import separation_dataset as separation_dataset
from jaxattn.data.sequences import recall_batch as recall_batch
from jaxattn.data.sequences import (
  single_location_batch as single_location_batch,
)
from jaxattn.data.tables import load_breast_cancer as load_breast_cancer
from jaxattn.data.tables import load_digits as load_digits
from jaxattn.data.text import byte_batches as byte_batches
from jaxattn.data.text import load_text as load_text

__all__ = [
  "ICLTask",
  "byte_batches",
  "corrupt_prompt",
  "load_breast_cancer",
  "load_digits",
  "load_text",
  "recall_batch",
  "sample_icl_task",
  "separation_dataset",
  "single_location_batch",
]
