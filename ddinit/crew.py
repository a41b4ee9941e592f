"""A crew: processes that work on one net together, each on its part of every batch's images.

Caffe's pooling, LRN and unrolling for convolutions use one thread, and pycaffe holds Python's lock:
two processes with one BLAS thread each forward a batch of CaffeNet in three quarters of the time
that one process with two takes, one of GoogLeNet in two thirds.  All of them run the same program
on the same random numbers and tell each other what they measure (section 3's statistics are means
over images), so that their weights stay equal.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' \\
        --processes 2
"""
import logging
import mmap
import multiprocessing
import os
import signal
import traceback
from typing import Any, Callable, List, Optional, Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from ddinit.processes import InChild, die_with_parent, pickled

# Variables that tell BLAS libraries how many threads to use, read when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# More processes than this gain little and hold a copy of all weights each.
MOST = 4
# Images of a batch that a process has at least: the variation within layers comes from their pairs.
LEAST = 4
# Numbers that are added up in one go, in memory that all share.
CHUNK = 1 << 20


class Crew:
    """One of the processes of a crew: number `rank` of `size`; the first, 0, hears all others."""

    def __init__(self, rank: int = 0, size: int = 1, board: Any = None, pipes: Sequence[Any] = (),
                 members: Sequence[Any] = ()) -> None:
        self.rank = rank
        self.size = size
        self._board = board
        self._turn = 0
        self._pipes = pipes
        self._members = members

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> List[Any]:
        """Return all processes' values in order of rank, in all; a barrier.

        Raises in the first what another process raised.  Where one was killed, or aborted by
        Caffe, the first ends as it did: `processes.in_child` tells the user why.
        """
        if not self.first:
            self._pipes[0].send((value, None, ""))
            return self._pipes[0].recv()
        values = [value] + [self._receive(number) for number in range(len(self._pipes))]
        for pipe in self._pipes:
            pipe.send(values)
        return values

    def total(self, array: np.ndarray) -> np.ndarray:
        """Make a float32 array the sum of all processes' arrays, the same bits in all; return it.

        Raises ValueError where the array does not lie in one piece, row by row.
        """
        if self.size == 1:
            return array
        if not array.flags.c_contiguous:
            raise ValueError("an array of strides %s has no sum in place" % (array.strides,))
        flat = array.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            piece = flat[start:start + CHUNK]
            self._turn = 1 - self._turn  # others may still read the sum before this one
            parts = self._board[self._turn, :, :piece.size]
            parts[self.rank] = piece
            self.gather(None)
            parts.sum(axis=0, out=piece)
        return array

    def own(self, count: int) -> slice:
        """The part of `count` things that is this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def _receive(self, number: int) -> Any:
        try:
            value, error, where = self._pipes[number].recv()
        except EOFError:
            self._members[number].join()
            code = self._members[number].exitcode
            if code < 0:
                if -code != signal.SIGKILL:
                    signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            raise RuntimeError("a process of the crew ended with status %d" % code) from None
        if error is not None:
            raise error from InChild(where)
        return value


ALONE = Crew()


def together(size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(crew, *arguments) of the first of `size` processes that all run it.

    The others are forks of this one, which must not have threads, and end with it.
    """
    if size == 1:
        return function(ALONE, *arguments)
    context: Any = multiprocessing.get_context("fork")
    board = np.frombuffer(mmap.mmap(-1, 2 * size * CHUNK * 4), np.float32).reshape(2, size, CHUNK)
    pipes: List[Any] = []
    members: List[Any] = []
    for rank in range(1, size):
        ours, theirs = context.Pipe()
        member = context.Process(target=_follow, daemon=True, args=(
            Crew(rank, size, board, [theirs]), theirs, function, arguments))
        member.start()
        theirs.close()
        pipes.append(ours)
        members.append(member)
    return function(Crew(0, size, board, pipes, members), *arguments)


def _follow(crew: Crew, pipe: Any, function: Callable[..., Any],
            arguments: Sequence[Any]) -> None:
    """Run a member of the crew other than the first, which alone speaks to the user."""
    die_with_parent()
    logging.disable(logging.CRITICAL)
    try:
        function(crew, *arguments)
    except BaseException as error:
        pipe.send_bytes(pickled((None, error, "\n" + traceback.format_exc())))
    os._exit(0)  # Caffe's destructors may crash after the work is done


def processes(batch_size: int, wanted: Optional[int] = None) -> int:
    """Return how many processes to use for batches of so many images.

    `wanted` at most, or else one per processor that this process may use, up to MOST.  All get
    equally many images, LEAST or more.
    """
    limit = wanted or min(processors(), MOST)
    sizes = [size for size in range(1, limit + 1)
             if batch_size % size == 0 and batch_size // size >= LEAST]
    return max(sizes, default=1)


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """Return how many threads BLAS libraries may use: one a processor, or what the user says."""
    asked = [os.environ.get(name, "") for name in THREAD_VARIABLES]
    return min([processors()] + [int(one) for one in asked if one.isdigit() and int(one)])


def limit_threads(count: int) -> None:
    """Let BLAS libraries use so many threads, those that are loaded and those that will be."""
    os.environ.update({name: str(count) for name in THREAD_VARIABLES})
    threadpool_limits(limits=count, user_api="blas")
