"""Declare and run what all commands share that train or test a net."""
import argparse
import os
from typing import Any, Callable, Optional, Sequence, Tuple

from ddinit import argument_types, processes
from ddinit.argument_types import count, natural
from ddinit.net import choose_device

Adder = Callable[[argparse.ArgumentParser], Any]
WRITTEN = "final.caffemodel, snapshots, log.csv, curve.png and run.json"


def add_run(parser: argparse.ArgumentParser, written: str = WRITTEN) -> None:
    """Add NET, WEIGHTS and OUTDIR, which receives what is `written`."""
    add = parser.add_argument
    add("net", metavar="NET", help="network definition, deploy or train_val")
    add("weights", metavar="WEIGHTS", help="caffemodel to start from, or 'none' to use the fillers "
                                           "of the definition")
    add("folder", metavar="OUTDIR", help="folder for %s; made where it is missing" % written)


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add NET and WEIGHTS of a net that the same command has trained."""
    parser.add_argument("net", metavar="NET", help="the definition that was given to train")
    parser.add_argument("weights", metavar="WEIGHTS",
                        help="final.caffemodel or the caffemodel of a snapshot")


def add_snapshots(parser: argparse.ArgumentParser, every: int) -> None:
    """Add --snapshot, by default `every` iterations, and --resume."""
    parser.add_argument("--snapshot", type=count, default=every, metavar="N",
                        help="iterations between snapshots (default: %(default)d)")
    parser.add_argument("--resume", action="store_true",
                        help="continue from the last snapshot in OUTDIR")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed, by default 0."""
    parser.add_argument("--seed", type=natural, default=0, metavar="N",
                        help="random seed (default: %(default)d)")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers, by default a core less than there are, up to 4."""
    default = min(4, max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--workers", type=natural, default=default, metavar="N",
                        help="processes that read images; 0: read between iterations (default "
                             "%(default)d)")


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Add --workers, --cpu and --gpu."""
    add_workers(parser)
    argument_types.add_device(parser)


def parse(argv: Optional[Sequence[str]], program: str, description: str,
          train: Tuple[str, Adder], test: Tuple[str, Adder]) -> argparse.Namespace:
    """Return what a command line of a script asks for that has the commands train and test.

    Each is a line of help and a function that adds the command's options.
    """
    parser = processes.Parser(prog=program, description=description.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, add_options) in (("train", train), ("test", test)):
        add_options(commands.add_parser(name, help=text))
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Return the exit status of `arguments.function(arguments, gpu)`, run in a child process."""
    gpu = choose_device(arguments.cpu, arguments.gpu)
    return int(processes.in_child(arguments.function, arguments, gpu))
