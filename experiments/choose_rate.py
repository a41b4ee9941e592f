"""Chooses the learning rate whose trial did best, and never looks at the test set (section 4).

    python experiments/choose_rate.py build/rate.txt 0.001=build/voc_kmeans.json

Trials are results of classify_voc.py or detect_voc.py, of nets trained on `train` and tested on
`val` (hold_back.py).  OUT gets the rate with the best mean average precision, as it is written
here; where all trials diverged, the smallest.
"""
import argparse
import logging
import sys
from typing import Optional, Sequence, Tuple

from ddinit import files, processes, results

log = logging.getLogger("choose_rate")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write the rate that the command line's results lead to; return the exit status."""
    parser = processes.Parser(prog="choose_rate.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="text file for the rate")
    parser.add_argument("trials", metavar="RATE=RESULT.json", nargs="+", type=_trial,
                        help="what each learning rate led to")
    processes.log_to_stderr()
    return processes.command_line(run, parser.parse_args(argv), parser.prog)


def _trial(text: str) -> Tuple[str, str]:
    rate, equals, path = text.partition("=")
    try:
        if float(rate) > 0 and equals and path:
            return rate, path
    except ValueError:
        pass
    raise argparse.ArgumentTypeError("'%s' is not RATE=RESULT.json" % text)


def run(arguments: argparse.Namespace) -> None:
    """Write the rate."""
    rate = chosen(arguments.trials)
    with files.replacing(arguments.out) as temporary, open(temporary, "w") as file:
        file.write(rate + "\n")


def chosen(trials: Sequence[Tuple[str, str]]) -> str:
    """Return the best of rates, given as (rate, path of its result).

    Raises ValueError naming a result without a mean average precision.
    """
    precision = {}
    for rate, path in trials:
        result = results.read_json(path)
        if "diverged" in result:
            log.info("%s: diverged in iteration %d", rate, result["diverged"])
        elif "mAP" in result:
            precision[rate] = result["mAP"]
            log.info("%s: mAP %.4f", rate, result["mAP"])
        else:
            raise ValueError("%s: holds no mAP" % path)
    if not precision:
        return min((rate for rate, _ in trials), key=float)
    return max(precision, key=lambda rate: precision[rate])


if __name__ == "__main__":
    sys.exit(main())
