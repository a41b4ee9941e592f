"""What guards the user's work: files are replaced whole, and Caffe runs where it may abort.

Caffe's failed CHECKs call abort(), which would take the Python process with it.  Commands of this
project therefore run Caffe in a child process (`in_child`), turn whatever ends it into one line
(`command_line`), and write every output under a temporary name first (`replacing`).

    python -c "import guarded, os; print(guarded.in_child(os.getpid))"
"""
import argparse
import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from typing import Any, Callable, Iterator, List, Optional

PR_SET_PDEATHSIG = 1  # prctl's option: the signal that a process gets when its parent ends


class ChildDied(ValueError):
    """The child process ended without an answer; the message holds Caffe's own last words."""


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`; rename it to `path` only if the block succeeds.

    A file that existed stays whole until the new one is, whatever happens in between.
    Raises OSError naming the folder where it cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix="." + name + ".", suffix=".part", dir=folder)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str) -> None:
    """Raise ValueError now, not after minutes of work, where `path` cannot be written."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError("%s: the folder %s does not exist" % (path, folder))
    if os.path.isdir(path):
        raise ValueError("%s is a folder, not a file to write" % path)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError("%s: cannot write there (%s)" % (path, error.strerror)) from error


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments), run in a fresh child process that dies with this one.

    `function` must be importable by name.  SIGINT and SIGTERM are passed on to the child, which
    decides what to do.  What Caffe prints on file descriptor 2 is kept from the terminal.
    Raises what the child raised, or ChildDied (a ValueError) where it aborted or was killed.
    """
    context = multiprocessing.get_context(_start_method())
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="caffe.", suffix=".log") as log:
        child = context.Process(target=_child_main, args=(sender, log.name, function, arguments))
        child.start()
        sender.close()
        with _signals_passed_to(child.pid):
            try:
                succeeded, answer = receiver.recv()
            except EOFError:
                child.join()
                if child.exitcode in (-signal.SIGINT, -signal.SIGTERM):
                    raise KeyboardInterrupt from None
                raise ChildDied(_last_words(log.name, child.exitcode)) from None
            child.join()
    if not succeeded:
        raise answer
    return answer


def command_line(run: Callable[[Any], Optional[int]], arguments: Any, program: str) -> int:
    """Return the exit status of run(arguments): errors a user can cause are one line and a 2."""
    try:
        return run(arguments) or 0
    except KeyboardInterrupt:
        print("%s: interrupted" % program, file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print("%s: error: %s" % (program, message), file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, like all others."""

    def error(self, message: str) -> Any:
        self.exit(2, "%s: error: %s (see --help)\n" % (self.prog, message))


def log_to_stderr(quiet: bool = False) -> None:
    """Send log messages to stderr as plain lines; with `quiet` only warnings."""
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere no effect)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_method() -> str:
    """How to start a child: forking spares its imports, where nothing of ours can deadlock it."""
    alone = "caffe" not in sys.modules and threading.active_count() == 1
    return "fork" if alone and sys.platform.startswith("linux") else "spawn"


def _child_main(sender: Any, log: str, function: Callable[..., Any], arguments: tuple) -> None:
    die_with_parent()
    os.setpgid(0, 0)  # so that Ctrl-C reaches the parent alone, which passes it on once
    terminal = os.dup(2)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    try:
        answer = (True, function(*arguments))
    except BaseException as error:  # the parent decides what to show of it
        answer = (False, error)
    sender.send(answer)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Caffe's destructors may crash after the work is done


@contextlib.contextmanager
def _signals_passed_to(process_id: Optional[int]) -> Iterator[None]:
    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id or 0, number)
    try:
        before = {number: signal.signal(number, pass_on)
                  for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals do not arrive here
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
