"""events.jsonl: what happened in a run, one JSON object a line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import CheckpointBroken
from manylora.files import raise_if_full, write_text_atomic

if TYPE_CHECKING:
    from types import TracebackType

FILE_NAME = "events.jsonl"


class EventLog:
    """Appends events to a run's log; each is on disk, for any reader, when `write` returns.

    An unfinished last line, left by a process that was killed while it wrote, is removed on opening.
    """

    def __init__(self, run: str | Path):
        self.path = Path(run) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time of now (unix seconds); numbers that are not finite become null.

        Raises:
            DiskFull: no space. TypeError: a value that JSON cannot hold.
        """
        first = {name: fields.pop(name) for name in ("member", "step") if name in fields}
        record = {"event": event, **first, "time": time.time(), **fields}
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        end = self._stream.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line.encode("utf-8"))
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            # no half line may stay in front of the next event
            self._stream.truncate(end)
            raise_if_full(error, self.path)
            raise

    def truncate_after(self, tick: int) -> int:
        """Drop what happened after `tick` steps of the loop; returns how many events that was.

        A run that resumes from the checkpoint of this tick lives through them again. An event without a tick belongs
        to those around it: it goes when one of a later tick stands before it.
        """
        later = False

        def stays(event: Mapping[str, Any]) -> bool:
            nonlocal later
            later = later or event.get("tick", 0) > tick
            return event["tick"] <= tick if "tick" in event else not later

        return self._keep(stays)

    def drop_after(self, steps: Mapping[str, int]) -> int:
        """Drop what some members did after so many of their own steps; returns how many events that was.

        For members that go back to an earlier state while others do not. A step of -1 drops all of a member.
        """
        return self._keep(lambda event: event.get("step", 0) <= steps.get(event.get("member", ""), math.inf))

    def _keep(self, stays: Callable[[Mapping[str, Any]], bool]) -> int:
        """Rewrite the log with the events that stay; how many went."""
        self._stream.close()
        events = read_events(self.path.parent)
        kept = [event for event in events if stays(event)]
        if len(kept) < len(events):
            lines = (json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n" for event in kept)
            write_text_atomic(self.path, "".join(lines))
        self._open()
        return len(events) - len(kept)

    def close(self) -> None:
        """Close the file; harmless when it is closed already."""
        self._stream.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        _cut_torn_line(self.path)
        # unbuffered: what a full disk refused must not be tried again by close()
        self._stream = self.path.open("ab", buffering=0)


def read_events(run: str | Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; none when it has no log yet. An unfinished last line is left out.

    Raises:
        CheckpointBroken: a line before the last is not a JSON object.
    """
    path = Path(run) / FILE_NAME
    if not path.exists():
        return []
    events: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a line being written
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError as error:
            raise CheckpointBroken(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(event, dict):
            raise CheckpointBroken(f"{path}, line {number} is not a JSON object")
        events.append(event)
    return events


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("r+b") as stream:
            stream.truncate(content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: scalars of numpy and torch become numbers, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, bool, int, float)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        # float() also strips subclasses such as numpy.float64
        return float(value) if math.isfinite(value) else None
    return value
