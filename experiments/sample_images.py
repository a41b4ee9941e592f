"""Draws images at random: to initialise from, to measure on, to look up (paper, section 4).

    python experiments/sample_images.py --voc datasets/VOCdevkit/VOC2007 --split trainval \
        --count 160 --seed 0 --out build/images
    python experiments/sample_images.py --list train.txt --root ILSVRC2012/train --count 100 50000 \
        --seed 0 --out build/queries.txt build/pool.txt

Several counts give sets that share no image.  An output called ...txt is a list of paths, any other
a folder of links, for magic_init.py --data.
"""
import argparse
import os
import shutil
import sys
from typing import List, Optional, Sequence

import numpy as np

from ddinit import files, processes
from ddinit.argument_types import count, natural
from nearest_neighbours import read_paths
from voc import Voc


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Draw the images that the command line asks for; return the exit status."""
    parser = processes.Parser(prog="sample_images.py", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc", metavar="DIR", help="folder in VOC's layout to draw from")
    source.add_argument("--list", metavar="FILE", help="list of lines 'path' or 'path label'")
    parser.add_argument("--split", default="trainval", metavar="NAME",
                        help="of the VOC folder (default: %(default)s)")
    parser.add_argument("--root", default="", metavar="DIR",
                        help="folder that the list's paths start from")
    parser.add_argument("--count", type=count, nargs="+", required=True, metavar="N",
                        help="how many images for each output")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")
    parser.add_argument("--out", nargs="+", required=True, metavar="PATH",
                        help="lists (*.txt) or folders to write")
    arguments = parser.parse_args(argv)
    if len(arguments.count) != len(arguments.out):
        parser.error("--count and --out need one value for each set of images")
    processes.log_to_stderr()
    return processes.command_line(run, arguments, parser.prog)


def run(arguments: argparse.Namespace) -> None:
    """Draw and write."""
    if arguments.voc:
        voc = Voc(arguments.voc)
        paths = [voc.image_path(image) for image in voc.images(arguments.split)]
    else:
        paths = read_paths(arguments.list, arguments.root)
    wanted = sum(arguments.count)
    if len(paths) < wanted:
        raise ValueError("%s: %d images are too few to draw %d from"
                         % (arguments.voc or arguments.list, len(paths), wanted))
    order = np.random.default_rng(arguments.seed).permutation(len(paths))
    start = 0
    for number, out in zip(arguments.count, arguments.out):
        chosen = [os.path.abspath(paths[place]) for place in sorted(order[start:start + number])]
        start += number
        (_write_list if out.endswith(".txt") else _link)(chosen, out)


def _write_list(paths: List[str], out: str) -> None:
    with files.replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("".join(path + "\n" for path in paths))


def _link(paths: List[str], folder: str) -> None:
    """Make a folder of links, whole or not at all; numbers before the names keep them apart."""
    unfinished = folder.rstrip(os.sep) + ".part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    for number, path in enumerate(paths):
        os.symlink(path, os.path.join(unfinished, "%06d_%s" % (number, os.path.basename(path))))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


if __name__ == "__main__":
    sys.exit(main())
