"""Every initialisation that tables 1 and 2 of the paper compare, each by one command.

    python experiments/initialise.py models/caffenet/deploy.prototxt build/kmeans.caffemodel \\
        --method ours-kmeans --voc datasets/VOCdevkit/VOC2007

Methods (section 4.2), for all affine layers, biases 0 but where the definition is the method:
    gaussian   N(0, 0.01^2), the standard deviation of figure 1's random weights
    reference  what the definition's fillers say (CaffeNet: hand-tuned by Jia et al. 2014)
    xavier     Caffe's filler of that name: uniform, variance 1 / fan-in (Glorot & Bengio 2010)
    msra       convolutions N(0, 2 / fan-in) (He et al. 2015), fully connected layers N(0, 0.01^2)
    ours-gaussian, ours-pca, ours-kmeans   weights of section 3.3
Scalings (table 1): none; within layers (section 3.1); between layers (section 3.2); both.  Ours
are scaled both ways, others not at all, unless told.  A method other than ours and gaussian cannot
be scaled within layers, which would leave nothing of it.
"""
import argparse
import logging
import os
import sys
import tempfile
from typing import Any, List, Optional, Sequence

import numpy as np

import magic_init
import training_net
from ddinit import argument_types, files, processes
from ddinit.prototxt import build_net, image_layers, import_caffe, read_definition
from ddinit.trained_weights import check_filled
from voc_lmdb import open_voc

FILLED = ("gaussian", "reference", "xavier", "msra")
OURS = {"gaussian": "gaussian", "ours-gaussian": "gaussian", "ours-pca": "pca",
        "ours-kmeans": "kmeans"}  # the type that magic_init knows it by
SCALINGS = {"none": ["--no-within"], "within": [], "between": ["--no-within", "--calibrate"],
            "both": ["--calibrate"]}
GAUSSIAN_STD = 0.01
MOST_A_BATCH = 16  # images


def initialise(arguments: argparse.Namespace) -> int:
    """Write the initialised net; return the exit status."""
    files.check_writable(arguments.output)
    scaling = arguments.scaling or ("both" if arguments.method.startswith("ours-") else "none")
    if arguments.method in FILLED and scaling == "none":
        with files.replacing(arguments.output) as temporary:
            processes.in_child(write_filled, arguments.net, temporary, arguments.method,
                             arguments.seed)
        logging.info("wrote %s", arguments.output)
        return 0
    if arguments.method not in OURS and scaling != "between":
        raise ValueError("--method %s cannot be scaled within layers: that draws their scale anew; "
                         "use ours-gaussian" % arguments.method)
    with tempfile.TemporaryDirectory(prefix="initialise.") as folder:
        command = [arguments.net, arguments.output, *_data(arguments, folder),
                   *_device(arguments), "--seed", str(arguments.seed)]
        if arguments.method in OURS:
            command += ["--type", OURS[arguments.method], *SCALINGS[scaling]]
        else:
            filled = os.path.join(folder, "filled.caffemodel")
            processes.in_child(write_filled, arguments.net, filled, arguments.method,
                             arguments.seed)
            command += ["--load", filled, "--calibrate"]
        return magic_init.main(command)


def write_filled(net: str, output: str, method: str, seed: int) -> None:
    """Write the weights that Caffe's fillers draw for a method of FILLED.  Runs in a child."""
    layers, image = image_layers(read_definition(net), 1)
    assert image is not None  # because we asked for a batch of 1
    whole = training_net.input_net([training_net.plain(layer) for layer in layers], image)
    for layer in whole.layer:
        if method != "reference":
            _set_fillers(layer, method)
    check_filled(whole, [layer.name for layer in whole.layer])
    import_caffe().set_random_seed(seed)
    build_net(whole).save(output)


def _set_fillers(layer: Any, method: str) -> None:
    if layer.type not in training_net.AFFINE:
        return
    parameters = getattr(layer, training_net.AFFINE[layer.type])
    parameters.ClearField("bias_filler")
    parameters.ClearField("weight_filler")
    if method == "gaussian" or (method == "msra" and layer.type == "InnerProduct"):
        parameters.weight_filler.type = "gaussian"
        parameters.weight_filler.std = GAUSSIAN_STD
    else:
        parameters.weight_filler.type = method


def _data(arguments: argparse.Namespace, folder: str) -> List[str]:
    """The options that tell magic_init which images to use, and how many a batch."""
    size = max(divisor for divisor in range(1, MOST_A_BATCH + 1)
               if arguments.images % divisor == 0)
    batches = ["--batch-size", str(size), "--batches", str(arguments.images // size)]
    if arguments.data is not None:
        return ["--data", arguments.data, *batches]
    if arguments.voc is None:
        raise ValueError("this initialisation looks at images: give --data or --voc")
    images = os.path.join(folder, "images")
    os.mkdir(images)
    _put_images(arguments.voc, arguments.images, arguments.seed, images)
    return ["--data", images, *batches]


def _put_images(voc: str, count: int, seed: int, folder: str) -> None:
    """Put `count` random training images of a VOC folder or its LMDB into `folder`."""
    reader = open_voc(voc)
    names = reader.images("trainval")
    if count > len(names):
        raise ValueError("%s: has %d training images, not %d" % (voc, len(names), count))
    for index in sorted(np.random.default_rng(seed).permutation(len(names))[:count]):
        with open(os.path.join(folder, names[index] + ".jpg"), "wb") as file:
            file.write(reader.read_bytes(names[index]))


def _device(arguments: argparse.Namespace) -> List[str]:
    if arguments.cpu:
        return ["--cpu"]
    return [] if arguments.gpu is None else ["--gpu", str(arguments.gpu)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Initialise as the command line says; return the exit status."""
    parser = processes.Parser(prog="initialise.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("net", metavar="NET", help="definition: deploy or train_val, any dialect")
    add("output", metavar="OUT", help="caffemodel to write; OUT.prototxt beside it where scaling "
                                      "between layers has to change the definition")
    add("--method", required=True, choices=sorted({*FILLED, *OURS}))
    add("--scaling", choices=list(SCALINGS), help="default: both for ours, none for the others")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("-d", "--data", metavar="GLOB", help="images: a pattern or a folder")
    images.add_argument("--voc", metavar="DIR", help="folder in VOC's layout or an LMDB of "
                        "make_voc_lmdb.py: random images of its trainval split")
    add("--images", type=argument_types.count, default=160, metavar="N",
        help="images to look at (default %(default)d)")
    add("--seed", type=argument_types.natural, default=0, metavar="N", help="default %(default)d")
    argument_types.add_device(parser)
    processes.log_to_stderr()
    return processes.command_line(initialise, parser.parse_args(argv), "initialise.py")


if __name__ == "__main__":
    sys.exit(main())
