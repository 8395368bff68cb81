"""Examples on disk: written as they are encoded, read through a memory map, so memory does not bound their number.

The file is Arrow IPC, one record batch per chunk of rows. A token takes four bytes, targets are kept as spans.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from manylora.data.example import Example

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from manylora.data.rows import Row
    from manylora.data.tokens import Marked

LONGEST_GROUP = 256
"""Bytes of a group that are kept as they are; of a longer one, its digest: a document cut into a thousand examples must
not be written a thousand times."""


def schema() -> pa.Schema:
    """The columns of the file."""
    import pyarrow as pa

    return pa.schema(
        {
            "tokens": pa.list_(pa.int32()),
            "spans": pa.list_(pa.int32()),  # start, stop, start, stop, ...
            "prompt": pa.string(),
            "reference": pa.string(),
            "group": pa.string(),  # null: the same as prompt
            "file": pa.string(),
            "line": pa.int64(),
            "label": pa.string(),
            "tags": pa.list_(pa.string()),
            "variant": pa.string(),
        }
    )


class Scratch:
    """A folder for one file of examples that goes with the last of them; `root` is where it is made (None: /tmp)."""

    def __init__(self, root: Path | None = None):
        self.path = Path(tempfile.mkdtemp(prefix="manylora-", dir=root))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class ExampleWriter:
    """Writes examples to one file, a chunk at a time; `close` before they are read."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self.path = path
        self.num_examples = 0
        self.num_tokens = 0
        self.num_trained = 0
        self.longest = 0
        self._schema = schema()
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def write(self, examples: Sequence[tuple[Row, Marked, str, str, str, str | None, str]]) -> None:
        """Append (row, tokens and targets, prompt, reference, group, label, variant) of each."""
        import pyarrow as pa

        if not examples:
            return
        rows, marked, prompts, references, groups, labels, variants = zip(*examples, strict=True)
        tokens = [one.tokens for one in marked]
        spans = [[place for span in one.spans for place in span] for one in marked]
        columns = [
            _lists(tokens),
            _lists(spans),
            pa.array(prompts, pa.string()),
            pa.array(references, pa.string()),
            pa.array(
                [None if group == prompt else _short(group) for group, prompt in zip(groups, prompts, strict=True)],
                pa.string(),
            ),
            pa.array([row.file for row in rows], pa.string()),
            pa.array([row.line for row in rows], pa.int64()),
            pa.array(labels, pa.string()),
            pa.array([one.tags for one in marked], pa.list_(pa.string())),
            pa.array(variants, pa.string()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        lengths = list(map(len, tokens))
        self.num_examples += len(tokens)
        self.num_tokens += sum(lengths)
        self.num_trained += sum(stop - start for one in marked for start, stop in one.spans)
        self.longest = max(self.longest, *lengths)

    def close(self) -> None:
        """Write the file's end; nothing can be added after it."""
        self._writer.close()
        self._file.close()


def _lists(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in lists], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _short(group: str) -> str:
    if len(group) <= LONGEST_GROUP:
        return group
    import hashlib

    return hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Chunk:
    """One record batch, its numbers as numpy views of the mapped file."""

    __slots__ = ("batch", "span_offsets", "spans", "token_offsets", "tokens")

    def __init__(self, batch: pa.RecordBatch):
        self.batch = batch
        tokens, spans = batch.column("tokens"), batch.column("spans")
        self.token_offsets = tokens.offsets.to_numpy()
        self.tokens = tokens.values.to_numpy()
        self.span_offsets = spans.offsets.to_numpy()
        self.spans = spans.values.to_numpy()

    def example(self, place: int) -> Example:
        start, stop = self.token_offsets[place], self.token_offsets[place + 1]
        spans = self.spans[self.span_offsets[place] : self.span_offsets[place + 1]].tolist()
        trained = np.zeros(stop - start, dtype=np.bool_)
        for first, last in zip(spans[::2], spans[1::2], strict=True):
            trained[first:last] = True
        text = {name: self.batch.column(name)[place].as_py() for name in _TEXTS}
        tags = text.pop("tags")
        if text["group"] is None:
            text["group"] = text["prompt"]
        prompt_length = spans[0] if spans else int(stop - start)
        tags = None if tags is None else tuple(tags)
        return Example(self.tokens[start:stop], trained, prompt_length, tags=tags, **text)

    def column(self, name: str) -> list[Any]:
        values = self.batch.column(name).to_pylist()
        if name == "tags":
            return [None if tags is None else tuple(tags) for tags in values]
        if name != "group":
            return values
        return [prompt if group is None else group for group, prompt in zip(values, self.column("prompt"), strict=True)]


_TEXTS = ("prompt", "reference", "group", "file", "line", "label", "tags", "variant")


class Examples(Sequence[Example]):
    """Encoded examples in the order of their rows; an example is made when it is asked for.

    `lengths` (n,) int64 counts the tokens of each. A slice, `take` and `+` are views: nothing is copied.
    """

    def __init__(self, chunks: Sequence[_Chunk], index: NDArray[np.int64] | None = None, keep: Any = None):
        self._chunks = list(chunks)
        self._starts = np.concatenate([[0], np.cumsum([chunk.batch.num_rows for chunk in self._chunks])]).astype(int)
        self._first = self._starts.tolist()
        self._index = np.arange(self._starts[-1]) if index is None else index
        self._keep = keep

    @classmethod
    def open(cls, path: Path, keep: Any = None) -> Examples:
        """The examples of a file; `keep` lives as long as they do (a temporary folder).

        Raises:
            pyarrow.ArrowInvalid: the file is not whole.
        """
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return cls([_Chunk(reader.get_batch(i)) for i in range(reader.num_record_batches)], keep=keep)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Examples: ...
    def __getitem__(self, place: int | slice) -> Example | Examples:
        if isinstance(place, slice):
            return Examples(self._chunks, self._index[place], self._keep)
        at = int(self._index[place])
        chunk = bisect_right(self._first, at) - 1
        return self._chunks[chunk].example(at - self._first[chunk])

    def __iter__(self) -> Iterator[Example]:
        return (self[place] for place in range(len(self)))

    def __add__(self, other: Examples) -> Examples:
        index = np.concatenate([self._index, other._index + self._starts[-1]])
        return Examples([*self._chunks, *other._chunks], index, (self._keep, other._keep))

    def keep_alive(self, folder: Scratch) -> None:
        """Let a temporary folder live as long as these examples and their views made from now on."""
        self._keep = (self._keep, folder)

    def take(self, places: Sequence[int] | NDArray[np.int64]) -> Examples:
        """The examples at these places, in this order."""
        return Examples(self._chunks, self._index[np.asarray(places, dtype=np.int64)], self._keep)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each example has."""
        lengths = [np.diff(chunk.token_offsets) for chunk in self._chunks]
        return (np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64))[self._index]

    @property
    def num_trained(self) -> NDArray[np.int64]:
        """How many targets each example has."""
        counts = [np.zeros(0, np.int64)]
        for chunk in self._chunks:
            sizes = np.concatenate([[0], np.cumsum(chunk.spans[1::2] - chunk.spans[::2])])
            counts.append(np.diff(sizes[chunk.span_offsets // 2]))
        return np.concatenate(counts)[self._index]

    def column(self, name: str) -> Iterator[Any]:
        """One text column of every example: prompt, reference, group, file, line, label, tags or variant."""
        whole = chain.from_iterable(chunk.column(name) for chunk in self._chunks)
        if np.array_equal(self._index, np.arange(self._starts[-1])):
            return whole
        values = list(whole)
        return (values[place] for place in self._index.tolist())


def lengths_of(examples: Any) -> NDArray[np.int64]:
    """How many tokens each example has, without making the examples where these know it."""
    if hasattr(examples, "lengths"):
        return examples.lengths
    return np.fromiter(map(len, examples), dtype=np.int64, count=len(examples))


def num_trained_of(examples: Any) -> NDArray[np.int64]:
    """How many targets each example has, without making the examples where these know it."""
    if hasattr(examples, "num_trained"):
        return examples.num_trained
    return np.fromiter((one.num_trained for one in examples), dtype=np.int64, count=len(examples))


def column_of(examples: Sequence[Example], name: str) -> Iterator[Any]:
    """One text of each example, without making the examples where they lie on disk."""
    return examples.column(name) if isinstance(examples, Examples) else (getattr(one, name) for one in examples)
