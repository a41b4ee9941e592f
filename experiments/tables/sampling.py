"""Draw images at random: to initialize from, to measure on, to look up (section 4)."""
import argparse
import os
import shutil
from typing import List

import numpy as np

from ddinit.argument_types import count, natural
from neighbours.pictures import read_paths
from tables import formats
from voc.folders import Voc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source of the images, and how many are drawn."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc", metavar="DIR", help="VOC folder to draw from")
    source.add_argument("--list", metavar="FILE", help="list of lines 'path' or 'path label'")
    parser.add_argument("--split", default="trainval", metavar="NAME",
                        help="split of the VOC folder (default: %(default)s)")
    parser.add_argument("--root", default="", metavar="DIR",
                        help="folder that the paths of the list start from")
    parser.add_argument("--count", type=count, nargs="+", required=True, metavar="N",
                        help="number of images of each output; outputs share no image")
    parser.add_argument("--seed", type=natural, default=0, metavar="N",
                        help="random seed (default: %(default)d)")
    parser.add_argument("--out", nargs="+", required=True, metavar="PATH",
                        help="a list to write (.txt), or a folder of links")


def run(arguments: argparse.Namespace) -> None:
    """Draw the images, and write lists or folders of links."""
    if len(arguments.count) != len(arguments.out):
        raise ValueError("--count and --out need the same number of values.")
    if arguments.voc:
        voc = Voc(arguments.voc)
        paths = [voc.image_path(image) for image in voc.images(arguments.split)]
    else:
        paths = read_paths(arguments.list, arguments.root)
    wanted = sum(arguments.count)
    if len(paths) < wanted:
        raise ValueError("%s: there are only %d images to draw %d from"
                         % (arguments.voc or arguments.list, len(paths), wanted))
    order = np.random.default_rng(arguments.seed).permutation(len(paths))
    start = 0
    for number, out in zip(arguments.count, arguments.out):
        chosen = [os.path.abspath(paths[place]) for place in sorted(order[start:start + number])]
        start += number
        if out.endswith(".txt"):
            formats.write(out, "".join(path + "\n" for path in chosen))
        else:
            _link(chosen, out)


def _link(paths: List[str], folder: str) -> None:
    """Make a folder of links, whole or not at all; numbers make the names unique."""
    unfinished = folder.rstrip(os.sep) + ".part"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    for number, path in enumerate(paths):
        os.symlink(path, os.path.join(unfinished, "%06d_%s" % (number, os.path.basename(path))))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)

