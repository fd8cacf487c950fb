"""Training data: any dataset of Hugging Face, as rows that TRL trains on.

::

    from vgpo_trainer.data import DataSource, load_rows

    rows = load_rows(DataSource("hiyouga/geometry3k", split="train[:1000]"))
    rows.dataset[0]  # {"prompt": [...], "images": [<image>], "answer": "3", "row": "train[0]"}

A dataset is a hub's id, a folder or a file: parquet, JSON lines, CSV, Arrow, webdataset, an imagefolder, or what
``save_to_disk`` wrote. docs/train.md says which fields are read and what is refused. Every row is checked before
training starts; an error names the dataset, the split and the row.
"""

from vgpo_trainer.data.errors import DatasetError
from vgpo_trainer.data.loading import LoadedRows, load_rows
from vgpo_trainer.data.source import DataSource

__all__ = ["DataSource", "DatasetError", "LoadedRows", "load_rows"]
