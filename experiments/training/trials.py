"""Run many trainings, each a command with a folder of its own, so that nothing is done twice.

    FOLDER/command.json   the command, and the SHA-256 of the files outside FOLDER that it names
    FOLDER/outcome.json   {}, or {"diverged": ITERATION} where the loss was not finite

A folder whose command has changed is emptied. A training that was killed continues from its last
snapshot. A training that diverged is a result like others: a learning rate that was too high.
"""
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

from ddinit import results
from training.run_folder import sha256

log = logging.getLogger(__name__)

OUTCOME, COMMAND = "outcome.json", "command.json"
SECONDS = 1  # between two looks at whether a signal has come
# Options that say where and how a run computes, not what; and how many values they take.
IRRELEVANT = {"--cpu": 0, "--gpu": 1, "--workers": 1, "--processes": 1, "--snapshot": 1}


def is_done(folder: str, command: Sequence[str]) -> bool:
    """Return whether a command with these input files has ended in a folder."""
    return (os.path.exists(os.path.join(folder, OUTCOME))
            and _read(folder, COMMAND) == fingerprint(command, folder))


def outcome(folder: str) -> Dict[str, Any]:
    """Return how the command of a folder ended.

    Raises ValueError where it has not.
    """
    return results.read_json(os.path.join(folder, OUTCOME))


def train(runner: "Runner", folder: str, command: Sequence[str],
          output: Optional[str] = None) -> int:
    """Run a training command to its end and write its outcome; return the exit status.

    `--resume` is added to the command, and what it prints goes to the file `output`, if given.
    """
    record = fingerprint(command, folder)
    run = _read(folder, "run.json")
    ended = run.get("finished") or run.get("diverged") is not None
    if _read(folder, COMMAND) != record or ended:
        _empty(folder)
    results.write_json(os.path.join(folder, COMMAND), record)
    status = runner.run([*command, "--resume"], output)
    diverged = _read(folder, "run.json").get("diverged")
    if status and diverged is not None:
        log.warning("%s: the training diverged in iteration %d", folder, diverged)
        results.write_json(os.path.join(folder, OUTCOME), {"diverged": diverged})
        return 0
    if not status:
        results.write_json(os.path.join(folder, OUTCOME), {})
    return status


def make(runner: "Runner", folder: str, command: Sequence[str],
         output: Optional[str] = None) -> int:
    """Run a command that writes into a folder, emptied before; return the exit status."""
    _empty(folder)
    status = runner.run(command, output)
    if not status:
        results.write_json(os.path.join(folder, COMMAND), fingerprint(command, folder))
        results.write_json(os.path.join(folder, OUTCOME), {})
    return status


def fingerprint(command: Sequence[str], folder: str) -> Dict[str, Any]:
    """Return the relevant words of a command, and the SHA-256 of its files outside `folder`."""
    words: List[str] = []
    skipped = 0
    for word in command[1:]:
        if word in IRRELEVANT:
            skipped = IRRELEVANT[word] + 1
        if skipped:
            skipped -= 1
        else:
            words.append(word)
    inside = os.path.abspath(folder) + os.sep
    named = [word for word in words[1:]
             if os.path.isfile(word) and not os.path.abspath(word).startswith(inside)]
    return {"command": words, "files": {path: sha256(path) for path in named}}


def _read(folder: str, name: str) -> Dict[str, Any]:
    path = os.path.join(folder, name)
    return results.read_json(path) if os.path.exists(path) else {}


def _empty(folder: str) -> None:
    if os.path.isdir(folder) and os.listdir(folder):
        log.info("%s: emptied, because its command has ended or has changed", folder)
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)


class Runner:
    """Runs commands as child processes, which end with it.

    SIGTERM is passed on to all of them. SIGINT is ignored, because a terminal sends it to the
    children as well. After either, no other command is started.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = {**os.environ, **environment}
        self._running: Set[Any] = set()
        self._stopped_by = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle signals while the block runs, which has to be in the main thread."""
        before = {number: signal.signal(number, self._stop)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        self._stopped_by = number
        if number == signal.SIGTERM:
            for process in list(self._running):
                process.send_signal(number)

    def run(self, command: Sequence[str], output: Optional[str] = None) -> int:
        """Run a command; return its exit status as a shell counts it."""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(output, "a")) if output else None
            with self._lock:
                if self._stopped_by:
                    return 128 + self._stopped_by
                process = subprocess.Popen(command, env=self._environment, stdout=file,
                                           stderr=file)
                self._running.add(process)
            if self._stopped_by == signal.SIGTERM:  # the signal may have come before `add`
                process.terminate()
            status = None
            while status is None:
                # Not an endless wait: a signal that comes just before it would not be handled.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(SECONDS)
            self._running.discard(process)
        return status if status >= 0 else 128 - status

    def all(self, tasks: Sequence[Callable[[], Any]], at_a_time: int, what: str) -> List[Any]:
        """Return the results of tasks that run commands, `at_a_time` of which run together.

        After an exception in one of them no other task starts.
        """
        with ThreadPoolExecutor(at_a_time) as pool:
            futures = [pool.submit(task) for task in tasks]
            returned = []
            try:
                for number, future in enumerate(futures, 1):
                    while not future.done():
                        wait([future], SECONDS)
                    returned.append(future.result())
                    log.info("%s: %d of %d", what, number, len(futures))
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return returned


def last_line(path: str) -> str:
    """Return the last line of a command's output."""
    with open(path, errors="replace") as file:
        return (file.read().splitlines() or ["no output"])[-1]
