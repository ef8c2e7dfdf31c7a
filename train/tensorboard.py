"""RUN/tensorboard: the numbers of metrics.jsonl once more, for TensorBoard. Only the file format's library is needed here."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from models.files import writing
from train.runs import Log

_PLACES = {"block", "step", "epoch"}  # numbers that say where a row belongs


class Events:
    """An event file that a run makes anew whenever it begins or goes on, and then follows row by row.

    So it never has more or less than metrics.jsonl, wherever the run was killed before.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir()
            self._file = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time()):010d}"))
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(session_log=SessionLog(status=SessionLog.START)))  # a viewer that is open drops what it had
            for row in log.rows():
                self._add(row)
            self._file.flush()
        log.follow(self._follow)

    def close(self) -> None:
        with writing(self._folder):
            self._file.close()

    def _follow(self, row: dict[str, Any]) -> None:
        with writing(self._folder):
            self._add(row)
            self._file.flush()

    def _add(self, row: dict[str, Any]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        self._write(Event(step=row["step"], summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by tag: "train/loss", "test/P@1", "rewire/block-1/survival". Stages are no curves and have none."""
    places = {"train": "train", "eval": row.get("split"), "rewire": f"rewire/block-{row.get('block')}"}
    if row["kind"] not in places:
        return {}
    numbers = {key: value for key, value in row.items() if key not in _PLACES and isinstance(value, (int, float))}
    return {f"{places[row['kind']]}/{key}": float(value) for key, value in numbers.items()}
