"""One training run of the workflow and its test: goes on where it was killed, and may diverge.

    python experiments/trial.py train FOLDER -- python experiments/classify_voc.py train NET \
        WEIGHTS FOLDER --voc VOC
    python experiments/trial.py test FOLDER FOLDER/result.json -- python \
        experiments/classify_voc.py test NET FOLDER/final.caffemodel --voc VOC --out \
        FOLDER/result.json

`train` runs the command with --resume.  A folder is emptied first where its run had ended, or was
another command's or the same with other input files: then the workflow wants it again.  It writes
FOLDER/outcome.json: `{"weights": ...}`, or `{"diverged": iteration}` where the loss became
infinite, which for a learning rate that is tried is a result like others.  `test` runs its
command, or repeats in the result that the run diverged.
"""
import argparse
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from typing import Any, Dict, List, Optional, Sequence

from ddinit import processes, results

log = logging.getLogger("trial")

OUTCOME, COMMAND, WEIGHTS = "outcome.json", "command.json", "final.caffemodel"
# Options that say where and how a run computes, not what, and how many values they have.
NO_MATTER = {"--cpu": 0, "--gpu": 1, "--workers": 1, "--processes": 1, "--snapshot": 1}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train or test as the command line says; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    own, command = (given[:given.index("--")], given[given.index("--") + 1:]) \
        if "--" in given else (given, [])
    parser = processes.Parser(prog="trial.py", description=__doc__.splitlines()[0],
                            usage="%(prog)s train FOLDER | test FOLDER RESULT -- COMMAND")
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("train", "test"):
        added = commands.add_parser(name)
        added.add_argument("folder", metavar="FOLDER", help="the run's folder")
        if name == "test":
            added.add_argument("result", metavar="RESULT", help="the JSON file that COMMAND writes")
    arguments = parser.parse_args(own)
    if not command:
        parser.error("no command: write it behind --")
    arguments.words = command
    processes.log_to_stderr()
    return processes.command_line(train if arguments.what == "train" else test, arguments,
                                parser.prog)


def train(arguments: argparse.Namespace) -> int:
    """Run the training command to its end and write what came of it; return its exit status."""
    folder = arguments.folder
    record = fingerprint(arguments.words, folder)
    if not _goes_on(folder, record):
        log.info("%s: emptied to train afresh", folder)
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    results.write_json(os.path.join(folder, COMMAND), record)
    status = run(arguments.words + ["--resume"])
    diverged = _run_record(folder).get("diverged")
    if status == 0:
        results.write_json(os.path.join(folder, OUTCOME), {"weights": WEIGHTS})
    elif diverged is not None:
        results.write_json(os.path.join(folder, OUTCOME), {"diverged": diverged})
        log.warning("%s: diverged in iteration %d, recorded as such", folder, diverged)
        return 0
    return status


def test(arguments: argparse.Namespace) -> int:
    """Run the test command, or record that there is nothing to test; return the exit status."""
    outcome = results.read_json(os.path.join(arguments.folder, OUTCOME))
    if "diverged" not in outcome:
        return run(arguments.words)
    results.write_json(arguments.result, outcome)
    return 0


def fingerprint(command: Sequence[str], folder: str) -> Dict[str, object]:
    """Return what of a command matters, and the SHA-256 of the files that it names elsewhere."""
    words: List[str] = []
    skipped = 0
    for word in command[1:]:
        if word in NO_MATTER:
            skipped = NO_MATTER[word] + 1
        if skipped:
            skipped -= 1
        else:
            words.append(word)
    inside = os.path.abspath(folder) + os.sep
    files = [word for word in words[1:]
             if os.path.isfile(word) and not os.path.abspath(word).startswith(inside)]
    return {"command": words, "files": {path: _sha256(path) for path in files}}


def _sha256(path: str) -> str:
    with open(path, "rb") as file:  # run_folder's would load matplotlib for every short job
        return hashlib.sha256(file.read()).hexdigest()


def run(command: List[str]) -> int:
    """Run a command, passing SIGTERM on to it (a terminal gives it Ctrl-C itself); return its
    exit status, as shells count it."""
    process = subprocess.Popen(command)
    before = [signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number)),
              signal.signal(signal.SIGINT, signal.SIG_IGN)]
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    return status if status >= 0 else 128 - status


def _goes_on(folder: str, record: Dict[str, object]) -> bool:
    """Whether a folder is new, or holds part of the run that `record` describes."""
    if not os.path.isdir(folder) or not os.listdir(folder):
        return True
    command = os.path.join(folder, COMMAND)
    ended = _run_record(folder)
    return (os.path.exists(command) and results.read_json(command) == record
            and not ended.get("finished") and ended.get("diverged") is None)


def _run_record(folder: str) -> Dict[str, Any]:
    path = os.path.join(folder, "run.json")
    return results.read_json(path) if os.path.exists(path) else {}


if __name__ == "__main__":
    sys.exit(main())
