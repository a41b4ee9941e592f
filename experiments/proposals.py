"""Compute the selective-search proposals of a VOC folder, for detect_voc.py.

    python experiments/proposals.py VOCdevkit/VOC2007 trainval test --cache build/proposals
"""
import argparse
import sys
from typing import Optional, Sequence

import numpy as np

from ddinit import processes
from detection import proposals
from voc.folders import Voc


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Compute the proposals of splits into the cache; return the exit status."""
    parser = processes.Parser(prog="proposals.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("voc", metavar="VOC", help="VOC folder")
    parser.add_argument("splits", metavar="SPLIT", nargs="+", help="split, such as trainval")
    proposals.add_arguments(parser)
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    voc = Voc(arguments.voc)
    for split in arguments.splits:
        images = voc.images(split)
        counts = [len(boxes) for boxes in proposals.load(voc, images, arguments)]
        print("%s: %d images with %d to %d proposals, %.0f on average"
              % (split, len(images), min(counts), max(counts), np.mean(counts)))


if __name__ == "__main__":
    sys.exit(main())
