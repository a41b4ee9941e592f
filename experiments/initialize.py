"""Initialize a net by any of the methods that tables 1 and 2 of the paper compare.

    python experiments/initialize.py models/caffenet/deploy.prototxt build/kmeans.caffemodel \\
        --method ours-kmeans --voc datasets/VOCdevkit/VOC2007

Methods (section 4.2) set all affine layers; biases are 0 but for `reference`:
    gaussian   N(0, 0.01^2), the random weights of figure 1
    reference  the fillers of the definition (those of CaffeNet are hand-tuned, Jia et al. 2014)
    xavier     Caffe's filler of that name: uniform with variance 1 / fan-in (Glorot & Bengio 2010)
    msra       N(0, 2 / fan-in) in convolutions (He et al. 2015), else N(0, 0.01^2)
    ours-gaussian, ours-pca, ours-kmeans   the weights of section 3.3
Scalings (table 1) are none, within layers (section 3.1), between layers (section 3.2), or both.
The default is both for ours and none for the others. Only ours and gaussian can be scaled within
layers, which leaves nothing of the scale of other methods.
"""
import argparse
import logging
import os
import sys
import tempfile
from typing import List, Optional, Sequence

import numpy as np

import magic_init
from ddinit import argument_types, files, processes
from training.starts import FILLED, write_filled
from voc.databases import open_voc

OURS = {"gaussian": "gaussian", "ours-gaussian": "gaussian", "ours-pca": "pca",
        "ours-kmeans": "kmeans"}  # method: --type of magic_init.py
SCALINGS = {"none": ["--no-within"], "within": [], "between": ["--no-within", "--calibrate"],
            "both": ["--calibrate"]}
LARGEST_BATCH = 16  # images


def initialize(arguments: argparse.Namespace) -> int:
    """Write the initialized net; return the exit status."""
    files.check_writable(arguments.output)
    scaling = arguments.scaling or ("both" if arguments.method.startswith("ours-") else "none")
    if arguments.method in FILLED and scaling == "none":
        with files.replacing(arguments.output) as temporary:
            processes.in_child(write_filled, arguments.net, temporary, arguments.method,
                               arguments.seed)
        logging.info("wrote %s", arguments.output)
        return 0
    if arguments.method not in OURS and scaling != "between":
        raise ValueError("--method %s cannot be scaled within layers, because that replaces its "
                         "scale. Use ours-gaussian." % arguments.method)
    with tempfile.TemporaryDirectory(prefix="initialize.") as folder:
        command = [arguments.net, arguments.output, *_data(arguments, folder),
                   *_device(arguments), "--seed", str(arguments.seed)]
        if arguments.method in OURS:
            command += ["--type", OURS[arguments.method], *SCALINGS[scaling]]
        else:
            filled = os.path.join(folder, "filled.caffemodel")
            processes.in_child(write_filled, arguments.net, filled, arguments.method,
                               arguments.seed)
            command += ["--load", filled, "--calibrate"]
        if arguments.output_std is not None:
            command += ["--output-std", str(arguments.output_std)]
        return magic_init.main(command + ["--literal"] * arguments.literal)


def _data(arguments: argparse.Namespace, folder: str) -> List[str]:
    """Return the options of magic_init.py that name the images and the batches."""
    size = max(divisor for divisor in range(1, LARGEST_BATCH + 1)
               if arguments.images % divisor == 0)
    batches = ["--batch-size", str(size), "--batches", str(arguments.images // size)]
    if arguments.data is not None:
        return ["--data", arguments.data, *batches]
    if arguments.voc is None:
        raise ValueError("--method %s needs images: give --data or --voc." % arguments.method)
    images = os.path.join(folder, "images")
    os.mkdir(images)
    _put_images(arguments.voc, arguments.images, arguments.seed, images)
    return ["--data", images, *batches]


def _put_images(voc: str, count: int, seed: int, folder: str) -> None:
    """Put `count` random training images of a VOC folder or its LMDB into `folder`."""
    reader = open_voc(voc)
    names = reader.images("trainval")
    if count > len(names):
        raise ValueError("%s: there are only %d training images, not %d"
                         % (voc, len(names), count))
    for index in sorted(np.random.default_rng(seed).permutation(len(names))[:count]):
        with open(os.path.join(folder, names[index] + ".jpg"), "wb") as file:
            file.write(reader.read_bytes(names[index]))


def _device(arguments: argparse.Namespace) -> List[str]:
    if arguments.cpu:
        return ["--cpu"]
    return [] if arguments.gpu is None else ["--gpu", str(arguments.gpu)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Initialize as the command line says; return the exit status."""
    parser = processes.Parser(prog="initialize.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("net", metavar="NET", help="network definition, deploy or train_val")
    add("output", metavar="OUT", help="caffemodel to write, and OUT.prototxt beside it where "
                                      "scaling between layers has to change the definition")
    add("--method", required=True, choices=sorted({*FILLED, *OURS}))
    add("--scaling", choices=list(SCALINGS), help="default: both for ours, none for the others")
    add("--literal", action="store_true", help="take equation 2 to the letter, as magic_init.py "
                                               "--literal does")
    add("--output-std", type=argument_types.positive, metavar="STD", help="scale of the outputs at "
        "the start, as magic_init.py --output-std gives it")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("-d", "--data", metavar="GLOB", help="images: a pattern or a folder")
    images.add_argument("--voc", metavar="DIR", help="VOC folder, or an LMDB of "
                        "data/make_voc_lmdb.py: random images of its trainval split")
    add("--images", type=argument_types.count, default=160, metavar="N",
        help="images to initialize from (default: %(default)d)")
    add("--seed", type=argument_types.natural, default=0, metavar="N",
        help="random seed (default: %(default)d)")
    argument_types.add_device(parser)
    processes.log_to_stderr()
    return processes.command_line(initialize, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
