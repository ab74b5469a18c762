"""Looped transformers, and the tasks that they are run on."""

from jaxattn.looped.icl import ICLTask as ICLTask
from jaxattn.looped.icl import sample_icl_task as sample_icl_task

__all__ = ["ICLTask", "sample_icl_task"]
