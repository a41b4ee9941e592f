"""Packs the images of a VOC folder's split into an LMDB, with the labels (paper, section 4).

    python data/make_voc_lmdb.py --voc datasets/VOCdevkit/VOC2007 --split trainval \\
        build/trainval.lmdb

The image files are stored as they are.  A run that is killed leaves no OUT.lmdb, only a hidden
folder .OUT.lmdb.*.part that may be deleted.
"""
import argparse
import logging
import os
import sys
from typing import Optional, Sequence

from ddinit import processes
from voc import Voc
from voc_lmdb import write


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Make the database that the command line names; return the exit status."""
    parser = processes.Parser(prog="make_voc_lmdb.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT.lmdb", help="folder to write; it must not exist")
    parser.add_argument("--voc", metavar="DIR", required=True,
                        help="VOC-layout folder, such as VOCdevkit/VOC2007")
    parser.add_argument("--split", metavar="NAME", default="trainval",
                        help="which images, such as trainval or test (default: trainval)")
    processes.log_to_stderr()
    return processes.command_line(_run, parser.parse_args(argv), parser.prog)


def _run(arguments: argparse.Namespace) -> None:
    voc = Voc(arguments.voc)
    write(voc, arguments.split, arguments.out)
    size = os.stat(os.path.join(arguments.out, "data.mdb")).st_blocks * 512
    logging.info("%s: %d images, %d classes, %.1f MB", arguments.out,
                 len(voc.images(arguments.split)), len(voc.classes), size / 1e6)


if __name__ == "__main__":
    sys.exit(main())
