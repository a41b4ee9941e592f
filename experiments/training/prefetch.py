"""Compute batches ahead of their use in worker processes, always in the same order.

    batches = Prefetcher(make, arguments, workers=2, slot_bytes=1 << 20)
    batches.start(0)
    arrays = batches.next()

The workers are processes because pycaffe keeps Python's global lock while Caffe computes, so that
threads would wait just when they should work. Arrays pass through shared memory, and only their
shapes through pipes.
"""
import contextlib
import ctypes
import logging
import multiprocessing
import signal
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from ddinit.processes import die_with_parent

ALIGNMENT = 64  # bytes; where an array in shared memory starts


class Batch(NamedTuple):
    """What a worker computes: arrays of any shape, and a line for each image that was broken."""

    arrays: List[np.ndarray]
    broken: List[str]


class Prefetcher:
    """The batches of a function of the batch number, in order and ahead of their use.

    make, arguments   `make(*arguments)` returns the function `batch_of(number) -> Batch`; it is
                      called in every worker, so that it has to be picklable
    workers           number of processes; with 0, a batch is computed when it is asked for
    slot_bytes        what the arrays of a batch take at most
    broken_limit      more broken images are an error; each is reported once
    """

    def __init__(self, make: Callable[..., Callable[[int], Batch]], arguments: Sequence[Any],
                 workers: int, slot_bytes: int, broken_limit: int = 10) -> None:
        self._make = make
        self._arguments = tuple(arguments)
        self._workers = workers
        self._slot_bytes = slot_bytes + ALIGNMENT
        self._slots = workers + 1
        self._broken_limit = broken_limit
        self._broken: Set[str] = set()
        self._first = self._next = 0
        self._batch_of: Optional[Callable[[int], Batch]] = None
        self._processes: List[Any] = []
        self._pipes: List[Any] = []
        self._memory = np.empty(0, np.uint8)

    def start(self, first: int) -> None:
        """Start the workers at batch `first`."""
        self.close()
        self._first, self._next = first, 0
        if not self._workers:
            self._batch_of = self._make(*self._arguments)
            return
        context = multiprocessing.get_context("spawn")
        shared: Any = context.RawArray(ctypes.c_byte, self._slots * self._slot_bytes)
        self._memory = np.frombuffer(shared, np.uint8)
        for _ in range(self._workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, daemon=True, args=(
                theirs, shared, self._slot_bytes, self._make, self._arguments))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for place in range(self._workers):
            self._ask(place)

    def next(self) -> List[np.ndarray]:
        """Return the arrays of the next batch, which are valid until the next call.

        Raises ValueError where too many images are broken, and whatever a worker raised.
        """
        if self._batch_of is not None:
            batch = self._batch_of(self._first + self._next)
            self._next += 1
            self._report(batch.broken)
            return batch.arrays
        place = self._next
        self._ask(place + self._workers)
        answer = self._answer(place)
        self._next += 1
        if isinstance(answer, Exception):
            raise answer
        layout, broken = answer
        self._report(broken)
        return _views(self._slot(place), layout)

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(1)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes, self._batch_of = [], [], None
        self._memory = np.empty(0, np.uint8)

    def _slot(self, place: int) -> np.ndarray:
        start = place % self._slots * self._slot_bytes
        return self._memory[start:start + self._slot_bytes]

    def _ask(self, place: int) -> None:
        """Ask a worker for the batch at a place of the sequence; its slot has been read."""
        with contextlib.suppress(OSError):  # the worker has ended; `_answer` reports it
            self._pipes[place % self._workers].send((self._first + place, place % self._slots))

    def _answer(self, place: int) -> Any:
        try:
            return self._pipes[place % self._workers].recv()
        except (EOFError, OSError):
            process = self._processes[place % self._workers]
            process.join(1)
            raise ValueError("A worker that reads images has ended with exit status %s, most "
                             "likely because memory ran out. Use fewer --workers."
                             % process.exitcode) from None

    def _report(self, broken: Sequence[str]) -> None:
        for line in broken:
            if line in self._broken:
                continue
            self._broken.add(line)
            if len(self._broken) > self._broken_limit:
                raise ValueError("More than %d images are broken; the last is %s"
                                 % (self._broken_limit, line))
            logging.warning("skipped: %s", line)


def _work(pipe: Any, shared: Any, slot_bytes: int, make: Callable[..., Callable[[int], Batch]],
          arguments: Tuple[Any, ...]) -> None:
    """Answer requests for batches until the pipe or the parent ends."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides when to stop
    memory = np.frombuffer(shared, np.uint8)
    batch_of: Optional[Callable[[int], Batch]] = None
    while True:
        try:
            number, slot = pipe.recv()
            try:
                batch_of = batch_of or make(*arguments)
                batch = batch_of(number)
                start = slot * slot_bytes
                answer: Any = (_write(memory[start:start + slot_bytes], batch.arrays),
                               batch.broken)
            except Exception as error:  # raised again where the batch is asked for
                answer = error
            pipe.send(answer)
        except (EOFError, OSError):
            return


def _write(slot: np.ndarray, arrays: Sequence[np.ndarray]) -> List[Tuple[int, Any, Any]]:
    """Copy arrays into a slot; return the start, shape and type of each."""
    layout = []
    end = 0
    for array in arrays:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + array.nbytes
        if end > len(slot):
            raise ValueError("A batch of %d bytes does not fit into the %d bytes of its slot."
                             % (end, len(slot)))
        target = slot[start:end].view(array.dtype).reshape(array.shape)
        target[...] = array
        layout.append((start, array.shape, array.dtype.str))
    return layout


def _views(slot: np.ndarray, layout: Sequence[Tuple[int, Any, Any]]) -> List[np.ndarray]:
    views = []
    for start, shape, kind in layout:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        views.append(slot[start:start + size].view(kind).reshape(shape))
    return views
