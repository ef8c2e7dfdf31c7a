"""Reads data folders of several formats: texts with labels, the labels' names, and pairs that evaluation leaves out.

`Dataset` recognises the format by the files and is all that training needs to know. Splits are read text by text, so their
size needs no memory. Every fault is a DataError that names file and line, or row. docs/data.md shows each format.
"""

from train.data.contract import DataError, Labels
from train.data.dataset import Dataset

__all__ = ["DataError", "Dataset", "Labels"]
