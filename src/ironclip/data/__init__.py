"""Image data sets behind one function, `load_data`, and the table of those that there are, `known_data`."""

from __future__ import annotations

from ironclip.data.audit import Finding, audit
from ironclip.data.catalogue import known_data
from ironclip.data.join import joined
from ironclip.data.load import load_data
from ironclip.data.prompts import prompt_set
from ironclip.data.roots import data_root
from ironclip.data.types import DataInfo, Dataset, Sample

__all__ = [
    "DataInfo",
    "Dataset",
    "Finding",
    "Sample",
    "audit",
    "data_root",
    "joined",
    "known_data",
    "load_data",
    "prompt_set",
]
