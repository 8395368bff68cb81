from __future__ import annotations

import errno
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manylora.errors import CheckpointBroken, DiskFull
from manylora.runs.events import EventLog, read_events


def test_an_event_can_be_read_as_soon_as_it_is_written(tmp_path):
    with EventLog(tmp_path / "run") as log:
        before = time.time()
        log.write("step", loss=1.5, member="a", step=1)
        (event,) = read_events(tmp_path / "run")
    assert list(event) == ["event", "member", "step", "time", "loss"]
    assert before <= event["time"] <= time.time()
    assert (event["event"], event["member"], event["step"], event["loss"]) == ("step", "a", 1, 1.5)


def test_numbers_of_every_kind_become_valid_json_and_nan_becomes_null(tmp_path):
    with EventLog(tmp_path) as log:
        log.write(
            "eval",
            nan=math.nan,
            infinite=np.float32(np.inf),
            tensor=torch.tensor(2.5),
            count=np.int64(3),
            double=np.float64(0.25),
            nested={"list": (1, -math.inf)},
            path=Path("a"),
            text="d\u00e9j\u00e0\nvu",
            flag=True,
        )
    line = (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    assert line.count("\n") == 1
    event = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    del event["event"], event["time"]
    assert event == {
        "nan": None,
        "infinite": None,
        "tensor": 2.5,
        "count": 3,
        "double": 0.25,
        "nested": {"list": [1, None]},
        "path": "a",
        "text": "d\u00e9j\u00e0\nvu",
        "flag": True,
    }


def test_a_value_that_json_cannot_hold_is_an_error_and_writes_nothing(tmp_path):
    with EventLog(tmp_path) as log, pytest.raises(TypeError):
        log.write("step", wrong=object())
    assert read_events(tmp_path) == []


def test_a_torn_last_line_is_left_out_by_readers_and_cut_by_the_next_writer(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("step", step=1)
    path = tmp_path / "events.jsonl"
    with path.open("a") as stream:
        stream.write('{"event": "step", "ste')
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    with EventLog(tmp_path) as log:
        log.write("step", step=2)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


def test_a_broken_line_before_the_last_is_named(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(CheckpointBroken, match="line 2 is not JSON"):
        read_events(tmp_path)


def test_no_log_means_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_resuming_drops_what_came_after_the_checkpoint_and_goes_on_from_there(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("admitted", member="a")
        for step in (1, 2, 3, 4):
            log.write("step", member="a", step=step, tick=step)
            if step == 2:
                log.write("checkpoint", step=2, tick=2)
        log.write("done")
        assert log.truncate_after(2) == 3
        log.write("step", member="a", step=3, tick=3)
    kept = [(event["event"], event.get("step")) for event in read_events(tmp_path)]
    assert kept == [("admitted", None), ("step", 1), ("step", 2), ("checkpoint", 2), ("step", 3)]


def test_resuming_goes_by_the_tick_of_the_loop_and_not_by_the_step_of_a_member_that_came_late(tmp_path):
    with EventLog(tmp_path) as log:
        for tick in range(1, 7):
            log.write("step", member="a", step=tick, tick=tick)
            if tick > 3:
                log.write("step", member="late", step=tick - 3, tick=tick)
        assert log.truncate_after(4) == 4
    kept = [(event["member"], event["step"]) for event in read_events(tmp_path)]
    assert kept == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("late", 1)]


def test_resuming_at_the_last_step_leaves_the_file_alone(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("step", step=1, tick=1)
        before = (tmp_path / "events.jsonl").read_bytes()
        assert log.truncate_after(1) == 0
    assert (tmp_path / "events.jsonl").read_bytes() == before


class FillsUp:
    """The log's file on a disk that has room for ten more bytes."""

    def __init__(self, stream):
        self.stream = stream
        self.room = 10

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.stream.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_a_full_disk_is_named_and_no_half_line_stays(tmp_path):
    with EventLog(tmp_path) as log:
        log.write("step", step=1)
        before = log.path.read_bytes()
        whole, log._stream = log._stream, FillsUp(log._stream)
        with pytest.raises(DiskFull, match=r"events\.jsonl"):
            log.write("step", step=2)
        assert log.path.read_bytes() == before
        log._stream = whole
        log.write("step", step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]
