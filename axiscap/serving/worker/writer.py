"""Writes what a worker counts, in a thread that no step waits for."""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from axiscap.serving import shared_folder

_LOGGER = logging.getLogger("axiscap")

#: Seconds between two writes of the totals, and before a failed write is tried again.
TOTALS_EVERY = 5.0
#: The number of answers' readings between two removals of those that no client came for.
_DROP_EVERY = 256
#: The most bytes of the log that wait for a slow disk. Records beyond them are lost, and counted.
WAITING_BYTES = 16 << 20


class Writer:
    """Writes the totals, the log and the answers' readings in a thread, so that no step waits for a disk.

    A failure is logged once and counted on the metrics page, and the write is tried again. Capping goes on meanwhile.

    Parameters
    ----------
    totals
        a file of the server's own folder (:func:`axiscap.serving.shared_folder.folder`), replaced as a whole.
    log
        a file that gets a line for each record; None: no log.
    """

    def __init__(self, totals: Path, log: Path | None) -> None:
        self.logs = log is not None
        self._paths = {"totals": totals, "log": log, "answers": totals.parent}
        self._news = threading.Condition()
        self._totals: Mapping[str, Any] | None = None  # the newest; an older one is of no use
        self._lines = bytearray()
        self._answers: deque[tuple[str, Mapping[str, float]]] = deque()
        self._writing = threading.Lock()
        self._answers_written = 0
        self._failures = dict.fromkeys(shared_folder.WRITTEN, 0)
        self._failing: set[str] = set()
        self._lost = 0
        threading.Thread(target=self._run, name="axiscap-telemetry", daemon=True).start()
        atexit.register(self.flush)

    def totals(self, totals: Mapping[str, Any]) -> None:
        """Replaces the totals that the metrics page shows."""
        with self._news:
            self._totals = totals
            self._news.notify()

    def report(self, ticket: str, answer: Mapping[str, float]) -> None:
        """Queues the readings of an answer for its client, who waits briefly: a failed write is not repeated."""
        with self._news:
            self._answers.append((ticket, answer))
            self._news.notify()

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line for each record."""
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        with self._news:
            for line in lines:
                if len(self._lines) + len(line) <= WAITING_BYTES:
                    self._lines += line
                else:
                    self._lost += 1
            self._news.notify()

    def flush(self) -> bool:
        """Tries to write everything once, in this thread; returns whether nothing is left."""
        with self._writing:
            # The totals last, so that the others' failures are in them.
            parts = {"answers": self._answer, "log": self._append, "totals": self._replace}
            done = [self._attempt(what, write) for what, write in parts.items()]
            return all(done)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._totals is not None or self._lines or self._answers)
            if not self.flush():
                time.sleep(TOTALS_EVERY)

    def _attempt(self, what: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # whatever it is, the thread must live, and try again
            self._failures[what] += 1
            if what not in self._failing:
                self._failing.add(what)
                message = "axiscap: the %s cannot be written to %s, and will be tried again; capping goes on: %s"
                _LOGGER.warning(message, what, self._paths[what], error)
            return False
        if what in self._failing:
            self._failing.discard(what)
            _LOGGER.warning("axiscap: the %s can be written again", what)
        return True

    def _answer(self) -> None:
        folder = self._paths["answers"]
        assert folder is not None
        while self._answers:
            shared_folder.write_answer(folder, *self._answers.popleft())
            self._answers_written += 1
            if self._answers_written % _DROP_EVERY == 0:
                shared_folder.drop_answers(folder)

    def _append(self) -> None:
        path = self._paths["log"]
        if path is None or not self._lines:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened each time, since it may have been moved away; a pipe that nobody reads is an error, not a wait.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            while self._lines:
                with self._news:
                    waiting = bytes(self._lines)
                written = os.write(file, waiting)  # on a full disk a part, whose rest goes first the next time
                with self._news:
                    del self._lines[:written]
        finally:
            os.close(file)

    def _replace(self) -> None:
        with self._news:
            totals = self._totals
        path = self._paths["totals"]
        if totals is None or path is None:
            return
        shared_folder.write(path, {**totals, "failures": self._failures, "lost": self._lost})
        with self._news:
            if self._totals is totals:
                self._totals = None
