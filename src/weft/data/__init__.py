"""Illustrated documents: where they come from, which are kept, and how training reads them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.data.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]


def __getattr__(name: str) -> Any:
    # on first use: reading Parquet loads much that a source or a collator does not need
    if name in __all__:
        from weft.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module 'weft.data' has no attribute {name!r}")
