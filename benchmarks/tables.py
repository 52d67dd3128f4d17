"""Large sets of examples as memory-mapped tables: memory does not grow with the number of rows."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np

from data import Example
from plumbing.errors import UserError

datasets.disable_progress_bars()  # one for each file, hundreds


class Rows(Sequence):
    """Examples in a table on disk, each read on access.

    table: a memory-mapped datasets.Dataset. example: turns one of its rows (a dict) into an Example. size: number of
    rows to use (default: all), evenly spaced, so that a table sorted by label stays balanced.
    """

    def __init__(self, table: datasets.Dataset, example: Callable[[dict], Example], size: int | None = None):
        self.table, self.example = table, example
        self.size = len(table) if size is None else min(size, len(table))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, k):
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(self.size))]
        if not -self.size <= k < self.size:
            raise IndexError(f"row {k} of {self.size}")
        return self.example(self.table[int(k) % self.size * len(self.table) // self.size])


def table_of(read: Callable, files: list[Path], features: dict) -> datasets.Dataset:
    """All rows that `read(path)` yields for these files, in order, as one memory-mapped table.

    read: a generator function; its rows are dicts with the keys of features, which has each column's type ("string",
    "int64" or ["string"] for a list). A further column "file" has the file's number. The table is written once to the
    cache of `datasets` and reused until the reader's source or a file (name, size, modification time) changes.
    Raises UserError as `read` does, OSError if the cache cannot be written.
    """
    types = {name: datasets.List(datasets.Value(t[0])) if isinstance(t, list) else datasets.Value(t)
             for name, t in (features | {"file": "int32"}).items()}  # fmt: skip
    # a tuple: datasets splits a list into shards and calls the generator for each
    stamps = tuple((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    source = inspect.getsource(inspect.getmodule(read))
    if not stamps:
        return datasets.Dataset.from_dict({name: [] for name in types}, features=datasets.Features(types))
    try:
        return datasets.Dataset.from_generator(
            _rows_of_files,
            features=datasets.Features(types),
            gen_kwargs={"read": read, "stamps": stamps, "source": source},
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise unwritten_cache(cause) from None


def unwritten_cache(cause: OSError) -> OSError:
    """The error for a cache of `datasets` that cannot be written: the cause, the folder and what to do."""
    reason = (cause.strerror or str(cause)).splitlines()[-1]  # below lines of datasets' own
    reason = f"the cache of datasets cannot be written ({reason}): make room, or set HF_DATASETS_CACHE to another"
    return OSError(cause.errno, reason, str(datasets.config.HF_DATASETS_CACHE))


def _rows_of_files(read: Callable, stamps: tuple, source: str) -> Iterator[dict]:
    for number, (path, *_) in enumerate(stamps):
        try:
            for row in read(Path(path)):
                yield row | {"file": number}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def parts_of(table: datasets.Dataset, files: int) -> list[datasets.Dataset]:
    """The rows of each of the files of a `table_of`, as views: nothing is copied."""
    ends = np.searchsorted(table.with_format("numpy")["file"][:], np.arange(files + 1))
    return [table.select(range(a, b) if a < b else []) for a, b in itertools.pairwise(ends.tolist())]
