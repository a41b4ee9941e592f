"""What the tests of the command share: images, small nets, what plain Caffe makes of results."""
import json
import os
from typing import Any, Dict, NamedTuple, Optional

import cv2
import numpy as np
from tiny_net import stored_weights
from toy_nets import image_input, layer, net_of, parsed, squared_gradients

import magic_init
from ddinit.prototxt import caffe_messages, import_caffe, upgrade

SIDE = 16
MEAN = (104.0, 117.0, 123.0)
DATA = image_input(10, 3, SIDE, SIDE)
CONV = "convolution_param { num_output: %d kernel_size: 3 %s }"
RELU = layer("relu%d", "ReLU", "conv%d", "conv%d")
BODY = (layer("conv1", "Convolution", "data", "", CONV % (8, "")) + RELU % (1, 1, 1)
        + layer("pool1", "Pooling", "conv1", "", "pooling_param { kernel_size: 2 stride: 2 }")
        + layer("conv2", "Convolution", "pool1", "", CONV % (6, "pad: 1 group: 2"))
        + RELU % (2, 2, 2)
        + layer("fc3", "InnerProduct", "conv2", "", "inner_product_param { num_output: 12 }")
        + layer("relu3", "ReLU", "fc3", "fc3")
        + layer("drop3", "Dropout", "fc3", "fc3")
        + layer("fc4", "InnerProduct", "fc3", "", "inner_product_param { num_output: 5 }"))
TOY = DATA + BODY + layer("prob", "Softmax", "fc4")
AFFINE = ["conv1", "conv2", "fc3", "fc4"]


class Outcome(NamedTuple):
    """What a run of the command left: exit status, what it printed, its report."""
    status: int
    out: str
    err: str
    report: Optional[Dict[str, Any]]
    output: str

    @property
    def layers(self) -> Dict[str, Dict[str, Any]]:
        assert self.report is not None
        return {one["name"]: one for one in self.report["layers"]}


def write_images(folder: str, count: int, side: int = 24, seed: int = 0) -> str:
    """Write PNGs of colored blobs, as smooth as photographs; return the pattern for them."""
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        noise = rng.standard_normal((side, side, 3)).astype(np.float32)
        smooth = cv2.GaussianBlur(noise, (0, 0), 1.5) * 250 + 0.2 * 40 * noise
        image = np.clip(smooth + rng.uniform(60, 190, 3), 0, 255).astype(np.uint8)
        assert cv2.imwrite(os.path.join(folder, "%03d.png" % number), image)
    return os.path.join(folder, "*.png")


def pixels(pattern: str, height: int = SIDE, width: int = SIDE, mean: Any = MEAN,
           scale: float = 1.0) -> np.ndarray:
    """The images of a pattern as a net should get them: float (n, 3, height, width)."""
    folder = os.path.dirname(pattern)
    return np.array([scale * (cv2.resize(cv2.imread(os.path.join(folder, name)), (width, height))
                              .astype(np.float64) - mean).transpose(2, 0, 1)
                     for name in sorted(os.listdir(folder))])


def write_hdf5(path: str, data: np.ndarray) -> None:
    """Write datasets 'data' and, of zeros, 'label' with Caffe's own HDF5Output layer."""
    caffe = import_caffe()
    definition = path + ".prototxt"
    shape = " ".join("dim: %d" % one for one in data.shape)
    with open(definition, "w") as file:
        file.write(layer("in", "Input", "", "a b", "input_param { shape { %s } shape { dim: %d } }"
                         % (shape, len(data)))
                   + layer("out", "HDF5Output", "a b", "", "hdf5_output_param { file_name: '%s' }"
                           % path).replace("top: 'out'", ""))
    net = caffe.Net(definition, caffe.TEST)
    net.blobs["a"].data[...] = data
    net.forward()
    del net  # closes the file


def own_data_layer(kind: str, folder: str, images: str) -> str:
    """The prototxt of a layer, ImageData or HDF5, that feeds a pattern's images in batches of 4."""
    where = os.path.dirname(images)
    listing = os.path.join(folder, "list.txt")
    if kind == "ImageData":
        with open(listing, "w") as file:
            file.write("".join("%s 0\n" % os.path.join(where, name)
                               for name in sorted(os.listdir(where))))
        return layer("data", "ImageData", "", "data label", "transform_param { mean_value: 104 "
                     "mean_value: 117 mean_value: 123 } image_data_param { source: '%s' "
                     "batch_size: 4 new_height: %d new_width: %d }" % (listing, SIDE, SIDE))
    write_hdf5(os.path.join(folder, "images.h5"), pixels(images).astype(np.float32))
    with open(listing, "w") as file:
        file.write(os.path.join(folder, "images.h5") + "\n")
    return layer("data", "HDF5Data", "", "data label",
                 "hdf5_data_param { source: '%s' batch_size: 4 }" % listing)


def run(capsys: Any, folder: Any, definition: str, *options: str, name: str = "out",
        report: bool = True) -> Outcome:
    """Run the command on a definition (text) with its files in a folder."""
    prototxt = os.path.join(str(folder), "net.prototxt")
    with open(prototxt, "w") as file:
        file.write(definition)
    return run_file(capsys, folder, prototxt, *options, name=name, report=report)


def run_file(capsys: Any, folder: Any, prototxt: str, *options: str, name: str = "out",
             report: bool = True) -> Outcome:
    """Run the command on a definition's file."""
    output = os.path.join(str(folder), name + ".caffemodel")
    path = os.path.join(str(folder), name + ".json")
    capsys.readouterr()
    try:
        status = magic_init.main([prototxt, output, "--cpu", *options]
                                 + (["--report", path] if report else []))
    except SystemExit as end:
        status = int(str(end.code))
    captured = capsys.readouterr()
    found = None
    if report and status == 0:
        with open(path) as file:
            found = json.load(file)
    return Outcome(status, captured.out, captured.err, found, output)


def plain_outputs(prototxt: str, caffemodel: str, images: np.ndarray,
                  blob: str = "data") -> Dict[str, np.ndarray]:
    """The first top of every layer, by plain Caffe with the written files."""
    caffe = import_caffe()
    net = caffe.Net(prototxt, caffe.TEST, weights=caffemodel)
    net.blobs[blob].reshape(*images.shape)
    net.reshape()
    net.blobs[blob].data[...] = images
    found = {}
    for number, name in enumerate(net._layer_names):
        net._forward(number, number)
        tops = net._top_ids(number)
        if len(tops):
            found[name] = np.array(net.blobs[net._blob_names[tops[0]]].data, np.float64)
    return found


def by_channel(outputs: np.ndarray) -> np.ndarray:
    return np.moveaxis(outputs, 1, 0).reshape(outputs.shape[1], -1)


def rates_on(definition: str, caffemodel: str, images: np.ndarray,
             draws: int = 0) -> Dict[str, float]:
    """Equation 2 for every layer, from Caffe's gradients of single images and outputs."""
    alone = net_of(upgrade(parsed(definition)), 1)
    stored = stored_weights(caffemodel)
    for one in alone.layers:
        for blob, values in zip(one.blobs, stored.get(one.name, [])):
            blob.data[...] = values
    squares = squared_gradients(alone, images, draws)
    return {one.name: float(np.sqrt(squares[one.name].sum() / np.square(
        one.weights, dtype=np.float64).sum())) for one in alone.owners()}


def spread_on(definition: str, caffemodel: str, images: np.ndarray, draws: int = 0) -> float:
    """The largest over the smallest rate that a caffemodel has on some images."""
    rates = rates_on(definition, caffemodel, images, draws).values()
    return max(rates) / min(rates)


def remove_layers(caffemodel: str, path: str, *names: str) -> str:
    """Write a caffemodel without some layers; return its path."""
    net = caffe_messages().NetParameter()
    with open(caffemodel, "rb") as file:
        net.ParseFromString(file.read())
    kept = [one for one in net.layer if one.name not in names]
    copies = [type(one).FromString(one.SerializeToString()) for one in kept]
    net.ClearField("layer")
    net.layer.extend(copies)
    with open(path, "wb") as file:
        file.write(net.SerializeToString())
    return path


def bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def here(function: Any, *arguments: Any) -> Any:
    """In place of processes.in_child, where nothing can abort: it spares the child's start."""
    return function(*arguments)
