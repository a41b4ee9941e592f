"""Choose a learning rate by images that are held back from training, never by the test set."""
import argparse
import logging
from typing import Sequence, Tuple

from ddinit import results
from tables import formats

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add OUT and the trials."""
    parser.add_argument("out", metavar="OUT", help="text file for the learning rate")
    parser.add_argument("trials", metavar="RATE=RESULT.json", nargs="+", type=_trial,
                        help="each learning rate and its result of classify_voc.py or "
                             "detect_voc.py, trained on train and tested on val")


def _trial(text: str) -> Tuple[str, str]:
    rate, equals, path = text.partition("=")
    try:
        if float(rate) > 0 and equals and path:
            return rate, path
    except ValueError:
        pass
    raise argparse.ArgumentTypeError("'%s' is not RATE=RESULT.json" % text)


def run(arguments: argparse.Namespace) -> None:
    """Write the chosen rate as it is on the command line."""
    formats.write(arguments.out, chosen(arguments.trials) + "\n")


def chosen(trials: Sequence[Tuple[str, str]]) -> str:
    """Return the rate with the best mean average precision (11 points), of (rate, result) pairs.

    It is the smallest where all trials diverged. Raises ValueError naming a result without a mean
    average precision.
    """
    precision = {}
    for rate, path in trials:
        result = results.read_json(path)
        if "diverged" in result:
            log.info("%s: diverged in iteration %d", rate, result["diverged"])
        elif "mAP_11_points" in result:
            precision[rate] = result["mAP_11_points"]
            log.info("%s: mAP %.4f (11 points)", rate, precision[rate])
        else:
            raise ValueError("%s: the result has no mAP_11_points" % path)
    if not precision:
        return min((rate for rate, _ in trials), key=float)
    return max(precision, key=lambda rate: precision[rate])
