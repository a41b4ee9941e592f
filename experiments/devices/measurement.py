"""Initialize, rescale and train a network on one device, and measure what another can repeat."""
import contextlib
import os
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np

import magic_init
from ddinit.caffemodel import load_weights
from ddinit.images import ImageBatches, read_image
from ddinit.net import copy_weights, open_net, use_device
from ddinit.prototxt import caffe_messages, import_caffe, read_definition
from ddinit.session import MEAN
from imagenet import nets
from training import run_folder
from training.batches import Crops
from training.loop import Plan, train
from training.nets import image_source_layer

BATCH_SIZE, BATCHES, JUDGED = 16, 10, 4  # batches to initialize from, and others for the rates
CLASSES = 6  # the generated photographs are crops of so many, in turn
# At a rate at which the loss falls: otherwise the smallest differences grow from step to step.
ITERATIONS, LEARNING_RATE = 20, 3e-6
DISTURBANCE = 1.05


class Task(NamedTuple):
    """What every device computes.

    net         path of the definition
    images      photographs to initialize from, and to train on
    judged      other photographs, for change rates and outputs
    folder      where the first device leaves the weights that all of them start from
    seed        of weights, random losses and batches
    disturbed   a layer whose weights all devices but the first multiply by DISTURBANCE
    """
    net: str
    images: List[str]
    judged: List[str]
    folder: str
    seed: int
    disturbed: Optional[str] = None


def measure(task: Task, gpu: Optional[int]) -> Dict[str, Any]:
    """Return times, change rates, outputs and losses of a GPU, or of the CPU for None.

    Raises ValueError where the net does not have the layer to disturb.
    """
    use_device(gpu)
    net = import_caffe().Net(task.net, import_caffe().TRAIN)
    if task.disturbed not in (None, *net.params):
        raise ValueError("The net has no layer '%s' with weights; it has %s."
                         % (task.disturbed, ", ".join(net.params)))
    net.blobs[net.inputs[0]].reshape(BATCH_SIZE, *net.blobs[net.inputs[0]].shape[1:])
    net.forward()  # the first pass on a GPU loads its libraries
    paths = [os.path.join(task.folder, name + ".caffemodel") for name in ("kmeans", "calibrated")]
    is_first = not os.path.exists(paths[0])
    times = initialize(net, task, paths)
    if task.disturbed is not None and not is_first:
        paths = [disturbed_copy(net, path, task.disturbed) for path in paths]
    load_weights(net, paths[0])
    before = magic_init.change_rates(net, task.net, task.judged, JUDGED, task.seed)
    magic_init.calibrate(net, task.net, task.images, BATCHES, task.seed, keep_function=False)
    after = magic_init.change_rates(net, task.net, task.judged, JUDGED, task.seed)
    load_weights(net, paths[0])
    return {"times": times, "rates": {"before": before, "after": after},
            "outputs": rescaled_outputs(net, task),
            "losses": training_losses(task, paths[1], gpu)}


def initialize(net: Any, task: Task, paths: Sequence[str]) -> Dict[str, float]:
    """Initialize a net with k-means and both scalings; return the seconds, and those in Caffe.

    The weights after each of the two steps are saved where they are not yet.
    """
    spent = {"seconds": 0.0, "in_caffe": 0.0}
    for path, step in zip(paths, (
            lambda: magic_init.initialize(net, task.net, task.images, "kmeans", BATCHES, task.seed),
            lambda: magic_init.calibrate(net, task.net, task.images, BATCHES, task.seed))):
        with clocked(spent):
            step()
        if not os.path.exists(path):
            net.save(path)
    return spent


@contextlib.contextmanager
def clocked(spent: Dict[str, float]) -> Iterator[None]:
    """Add the seconds of a block to `spent`, and those of Caffe's forward and backward passes.

    A GPU computes on while Python does; reading Caffe's own timer waits for it.
    """
    net_class, timer = import_caffe().Net, import_caffe().Timer()
    passes = {name: getattr(net_class, name) for name in ("_forward", "_backward")}

    def timed(one_pass: Callable[..., Any]) -> Callable[..., Any]:
        def run_timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            timer.start()
            value = one_pass(*arguments)
            timer.stop()
            _ = timer.ms  # waits
            spent["in_caffe"] += time.perf_counter() - started
            return value
        return run_timed

    started = time.perf_counter()
    try:
        for name, one_pass in passes.items():
            setattr(net_class, name, timed(one_pass))
        yield
    finally:
        for name, one_pass in passes.items():
            setattr(net_class, name, one_pass)
    spent["seconds"] += time.perf_counter() - started


def disturbed_copy(net: Any, path: str, layer: str) -> str:
    """Write a copy of a caffemodel with the weights of a layer multiplied; return its path."""
    load_weights(net, path)
    net.params[layer][0].data[...] *= DISTURBANCE
    copy = path + ".disturbed"
    net.save(copy)
    return copy


def rescaled_outputs(net: Any, task: Task) -> Dict[str, np.ndarray]:
    """Rescale a net with its function kept; return its outputs on a batch, by blob."""
    text = magic_init.calibrate(net, task.net, task.images, BATCHES, task.seed, keep_function=True)
    path = task.net
    if text is not None:
        path = os.path.join(task.folder, "rescaled.prototxt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    seen = task.judged[:BATCH_SIZE]
    working = open_net(path, len(seen))
    copy_weights(net, working.net)
    working.load(ImageBatches(seen, working.inputs[0], MEAN, 1.0), 0)
    working.forward()
    return {name: np.array(working.blob(name).data) for name in working.outputs}


def training_losses(task: Task, weights: str, gpu: Optional[int]) -> List[float]:
    """Train a net to tell which photograph a crop is of; return the loss of each iteration.

    Dropout drops nothing, because its random numbers differ between devices.
    """
    net = nets.classifier(read_definition(task.net), BATCH_SIZE, CLASSES)
    for layer in net.layers:
        if layer.type == "Dropout":
            layer.dropout_param.dropout_ratio = 0
    height, width = net.image.shape[2:]
    images = np.stack([read_image(path, height, width).transpose(1, 2, 0)
                       for path in task.images])
    data = os.path.join(task.folder, "images.npz")
    np.savez(data, images=images, labels=np.arange(len(images)) % CLASSES)
    source = image_source_layer("data", (net.image.blob, "label"), "imagenet.arrays.ArrayImages",
                                {"path": data, "classes": CLASSES}, Crops(height, width),
                                BATCH_SIZE, task.seed, workers=0)
    solver = caffe_messages().SolverParameter(type="SGD", base_lr=LEARNING_RATE, lr_policy="fixed",
                                              momentum=0.9, weight_decay=5e-4)
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        train(Plan(nets.training_definition(net, source), solver, folder, ITERATIONS, task.seed,
                   weights, fresh=net.last_layers, gpu=gpu))
        return [row["loss"] for row in run_folder.read_table(os.path.join(folder, "log.csv"))]
