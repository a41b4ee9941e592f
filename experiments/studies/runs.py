"""Run the commands of a study, each in a folder of its own that is not run twice."""
import os
import sys
from typing import Any, Callable, Dict, List, Sequence, Tuple

from training import trials
from training.starts import definition_of

EXPERIMENTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def runner() -> trials.Runner:
    """Return a runner whose commands use one core each."""
    return trials.Runner(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")


def script(name: str, *words: object) -> List[str]:
    """Return the command line of a script of experiments/."""
    return [sys.executable, os.path.join(EXPERIMENTS, name), *map(str, words)]


def initialized(run: trials.Runner, folder: str, net: str, *options: object) -> Tuple[str, str]:
    """Return the definition and the caffemodel that initialize.py has written into a folder.

    Raises ValueError with what the command says where it fails.
    """
    weights = os.path.join(folder, "start.caffemodel")
    make_once(run, folder, script("initialize.py", net, weights, *options, "--cpu"))
    return definition_of(net, weights), weights


def trained(run: trials.Runner, folder: str, command: Sequence[str]) -> Dict[str, Any]:
    """Return the outcome of a training command in a folder.

    Raises ValueError with what the command says where it fails.
    """
    _run_once(trials.train, run, folder, command)
    return trials.outcome(folder)


def make_once(run: trials.Runner, folder: str, command: Sequence[str]) -> None:
    """Run a command that writes into a folder, unless it has.

    Raises ValueError with what the command says where it fails.
    """
    _run_once(trials.make, run, folder, command)


def _run_once(how: Callable[..., int], run: trials.Runner, folder: str,
              command: Sequence[str]) -> None:
    if trials.is_done(folder, command):
        return
    output = folder.rstrip(os.sep) + ".log"
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    status = how(run, folder, command, output)
    if status > 128:
        raise KeyboardInterrupt
    if status:
        raise ValueError("%s: %s" % (folder, trials.last_line(output)))
