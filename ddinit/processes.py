"""Run Caffe where it may abort, in a child process, and end a command in one line.

Caffe's failed CHECKs call abort(), which would take the Python process with it.  Commands of this
project therefore run Caffe in a child (`in_child`) and turn whatever ends it into one line and an
exit status (`command_line`).
"""
import argparse
import contextlib
import ctypes
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import traceback
from multiprocessing import resource_tracker
from typing import Any, Callable, Dict, List, Optional, Tuple

PASSED_ON = (signal.SIGINT, signal.SIGTERM)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's options, of malloc.h
# OpenBLAS's idle threads wait 2^20 cycles for work before they sleep, not 2^26: Caffe, numpy and
# scipy each have theirs, which would take the processors from each other (results/speed.md).
BLAS_PATIENCE = {"OPENBLAS_THREAD_TIMEOUT": "20"}
PR_SET_PDEATHSIG = 1  # prctl's option: the signal that a process gets when its parent ends


class ChildDied(ValueError):
    """The child process ended without an answer; the message holds Caffe's own last words."""


class InChild(Exception):
    """The cause of an error that a child raised: where it did, as a traceback's text."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the child; `number` tells which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), run in a fresh child process that dies with this one.

    `function` must be importable by name.  SIGINT and SIGTERM are passed on to the child, which
    decides what to do.  What Caffe prints on file descriptor 2 is kept from the terminal.
    Raises what the child raised, or ChildDied (a ValueError) where it aborted or was killed.
    """
    context: Any = multiprocessing.get_context("spawn")
    for name, value in BLAS_PATIENCE.items():
        os.environ.setdefault(name, value)  # the child inherits it
    receiver, sender = context.Pipe(duplex=False)
    root = logging.getLogger()
    level = root.level if root.handlers else None
    with tempfile.NamedTemporaryFile(prefix="caffe.", suffix=".log") as log:
        child = context.Process(target=_child_main,
                                args=(sender, log.name, level, function, arguments))
        with _PassedOn() as signals:
            signals.start(child)
            sender.close()
            try:
                while not receiver.poll(0.2) and child.exitcode is None:
                    pass  # processes that it started may hold its end of the pipe when it is gone
                if not receiver.poll():
                    raise EOFError
                answer, error, where = receiver.recv()
            except EOFError:
                child.join()
                if signals.received:
                    raise Interrupted(signals.received[0]) from None
                raise ChildDied(_last_words(log.name, child.exitcode)) from None
            child.join()
    if error is not None:
        raise error from InChild(where)
    return answer


def command_line(run: Callable[[Any], Optional[int]], arguments: Any, program: str) -> int:
    """Return the exit status of run(arguments): errors a user can cause are one line and a 2."""
    try:
        return run(arguments) or 0
    except KeyboardInterrupt as error:
        print("%s: interrupted" % program, file=sys.stderr)
        return 128 + int(getattr(error, "number", signal.SIGINT))
    except (ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print("%s: error: %s" % (program, message), file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        self.exit(2, "%s: error: %s (see --help)\n" % (self.prog, message))


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send log messages of a level and above to stderr as plain lines."""
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere no effect).

    A child of multiprocessing whose parent has ended before ends now.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for itself (glibc; elsewhere no effect).

    Arrays that come and go otherwise cost a page fault every 4 kB: a quarter of the time of an
    initialization on a virtual machine, and of a database more than all else that writing does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest that it takes
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _child_main(sender: Any, log: str, level: Optional[int], function: Callable[..., Any],
                arguments: tuple) -> None:
    die_with_parent()
    os.setpgid(0, 0)  # so that Ctrl-C reaches the parent alone, which passes it on once
    _keep_from_terminal(log)
    if level is not None:
        log_to_stderr(level)
    answer: Tuple[Any, Optional[BaseException], str]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        answer = (function(*arguments), None, "")
    except BaseException as error:  # the parent decides what to show of it
        answer = (None, error, "\n" + traceback.format_exc())
    sender.send_bytes(pickled(answer))
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Caffe's destructors may crash after the work is done


def _keep_from_terminal(log: str) -> None:
    """Send file descriptor 2, where libraries write, to a file; sys.stderr stays the terminal."""
    terminal = os.dup(2)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)


def pickled(answer: tuple) -> bytes:
    """The bytes of an answer, or of a plain error where it cannot be packed."""
    error = answer[1]
    try:
        packed = pickle.dumps(answer)
        if error is not None:
            pickle.loads(packed)  # some exceptions pack but do not unpack
        return packed
    except Exception as problem:
        kind = next((base for base in (ValueError, OSError) if isinstance(error, base)),
                    RuntimeError)
        return pickle.dumps((None, kind(str(error or problem)), answer[2]))


class _PassedOn:
    """Signals that go to a child instead of ending this process; held until there is one."""

    def __init__(self) -> None:
        self.received: List[int] = []
        self._child: Optional[int] = None
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> "_PassedOn":
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self._before = {number: signal.signal(number, self._receive) for number in PASSED_ON}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, child: Any) -> None:
        """Start a child that holds signals until it can act on them, and send it all there are."""
        resource_tracker.getfd()  # now: starting it lets signals in
        held = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        try:
            child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self._child = child.pid
        for number in self.received:
            self._send(number)

    def _receive(self, number: int, _: Any) -> None:
        self.received.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number)


def _last_words(log: str, exit_code: Optional[int]) -> str:
    """The line in which Caffe said why it aborted, without glog's time stamps."""
    with open(log, errors="replace") as file:
        lines: List[str] = file.read().splitlines()
    for line in lines:
        fatal = re.match(r"F\d+ [\d:.]+ +\d+ ([\w.]+:\d+)\] (.*)", line)
        if fatal:
            return "Caffe stopped: %s (%s)" % (fatal.group(2).strip(), fatal.group(1))
    if exit_code == -signal.SIGKILL:
        return "the work was killed, most likely because memory ran out"
    if exit_code is not None and exit_code < 0:
        return "Caffe crashed (%s)%s" % (signal.Signals(-exit_code).name,
                                         ": " + lines[-1] if lines else "")
    return "the work ended without a result" + (": " + lines[-1] if lines else "")
