"""Numbers and devices on command lines, checked where they are typed.

As in parser.add_argument("--iterations", type=argument_types.count, default=80000).
"""
import argparse

SEED_LIMIT = 2 ** 31


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Return a whole number of at least 0, as seeds and GPUs are."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """Return a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("'%s' is not a positive number" % text)
    return number


def finite(text: str) -> float:
    """Return a number from -1e6 to 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not abs(number) <= 1e6:
        raise argparse.ArgumentTypeError("'%s' is not a number from -1e6 to 1e6" % text)
    return number


def not_negative(text: str) -> float:
    """Return a number from 0 to 1e6."""
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError("'%s' is below 0" % text)
    return number


def fraction(text: str) -> float:
    """Return a number above 0 up to 1."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError("'%s' is above 1" % text)
    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --cpu and --gpu; `net.choose_device(arguments.cpu, arguments.gpu)` takes them."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="compute on the CPU")
    device.add_argument("--gpu", type=natural, metavar="ID", help="compute on this GPU (default: "
                        "GPU 0 where this Caffe can, else the CPU)")


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not least <= number < SEED_LIMIT:
        raise argparse.ArgumentTypeError("'%s' is not a whole number in %d..%d"
                                         % (text, least, SEED_LIMIT - 1))
    return number
