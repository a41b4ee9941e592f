"""The options that all commands have that train a net, or test one that they trained.

    python experiments/classify_voc.py train --help
"""
import argparse

from ddinit.argument_types import count, natural

WRITTEN = "final.caffemodel, snapshots, log.csv, curve.png and run.json"


def add_run(parser: argparse.ArgumentParser, written: str = WRITTEN) -> None:
    """Add NET, WEIGHTS and OUTDIR: what is trained, what it starts from, what gets `written`."""
    add = parser.add_argument
    add("net", metavar="NET", help="definition: deploy or train_val, any dialect")
    add("weights", metavar="WEIGHTS", help="caffemodel to start from, or 'none' for the fillers "
                                           "of the definition")
    add("folder", metavar="OUTDIR", help="folder for %s; made where it is missing" % written)


def add_trained(parser: argparse.ArgumentParser) -> None:
    """Add NET and WEIGHTS: a net that the same command trained."""
    parser.add_argument("net", metavar="NET", help="the definition given to train")
    parser.add_argument("weights", metavar="WEIGHTS", help="final.caffemodel, or a snapshot's")


def add_snapshots(parser: argparse.ArgumentParser, every: int) -> None:
    """Add --snapshot, by default `every` iterations, and --resume."""
    parser.add_argument("--snapshot", type=count, default=every, metavar="N",
                        help="iterations between snapshots (default %(default)d)")
    parser.add_argument("--resume", action="store_true", help="go on from OUTDIR's last snapshot")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed, by default 0."""
    parser.add_argument("--seed", type=natural, default=0, metavar="N",
                        help="default %(default)d")
