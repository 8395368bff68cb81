"""Data sets of the Hugging Face hub, memory-mapped from its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manylora.data.readers.needed import needed
from manylora.data.sources.folder import SPLITS, canonical
from manylora.data.sources.saved import Saved
from manylora.errors import DataNotFound

HUB = "hub:"


def open_hub(repository: str, split: str | None, subset: str | None, columns: Mapping[str, str]) -> Saved:
    """The rows of one split ("train" where none is named) of a data set; what is not in the cache is fetched.

    Raises:
        DataNotFound: no such data set, subset or split, or the hub cannot be reached.
    """
    place = f"{HUB}{repository}" + (f" ({subset})" if subset else "")
    datasets = needed("datasets", place)
    wanted = split or "train"
    dataset = _load(datasets, repository, subset, wanted, place)
    name = f"{place} [{wanted}]"
    return Saved(name, dataset, columns, lambda: f"fingerprint:{dataset._fingerprint}")


def _load(datasets: Any, repository: str, subset: str | None, wanted: str, place: str) -> Any:
    first: Exception | None = None
    # the hub has no rule for the names of splits: "valid" finds "validation" and "dev"
    for name in dict.fromkeys([wanted, *SPLITS.get(canonical(wanted), ())]):
        try:
            return datasets.load_dataset(repository, subset, split=name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first = first or error
            if "split" not in str(error).lower():
                break
    raise DataNotFound(
        f"{place}: the split {wanted!r} could not be had: {first}",
        next_step="check the name and the connection, or fetch it elsewhere with `hf download --repo-type dataset` and "
        "name the folder",
    ) from first
