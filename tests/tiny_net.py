"""A net of a few hundred weights, with dropout, that trains in milliseconds; and runs of it."""
import os
import subprocess
import sys
import time
from typing import Callable, Dict, List

import numpy as np

from ddinit.prototxt import caffe_messages

EXPERIMENTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "experiments")
DEFINITION = """
name: "tiny"
layer { name: "data" type: "Input" top: "data"
  input_param { shape { dim: 4 dim: 3 dim: 32 dim: 32 } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 4 kernel_size: 8 stride: 4 weight_filler { type: "xavier" } } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "drop1" type: "Dropout" bottom: "conv1" top: "conv1"
  dropout_param { dropout_ratio: 0.5 } }
layer { name: "fc2" type: "InnerProduct" bottom: "conv1" top: "fc2"
  inner_product_param { num_output: 6 weight_filler { type: "xavier" } } }
layer { name: "relu2" type: "ReLU" bottom: "fc2" top: "fc2" }
layer { name: "fc3" type: "InnerProduct" bottom: "fc2" top: "fc3"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "fc3" top: "prob" }
"""


def write(path) -> str:
    """Write the definition to `path`; return it as text."""
    with open(path, "w") as file:
        file.write(DEFINITION)
    return str(path)


def stored_weights(caffemodel) -> Dict[str, List[np.ndarray]]:
    """The blobs of every layer in a caffemodel, read by protobuf alone."""
    net = caffe_messages().NetParameter()
    with open(caffemodel, "rb") as file:
        net.ParseFromString(file.read())
    return {layer.name: [np.array(blob.data, np.float32).reshape(tuple(blob.shape.dim))
                         for blob in layer.blobs] for layer in net.layer if layer.blobs}


def command(script: str, *arguments) -> List[str]:
    """The command line of a script in experiments/."""
    return [sys.executable, os.path.join(EXPERIMENTS, script), *map(str, arguments)]


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a script to its end, with its output as text."""
    return subprocess.run(command(script, *arguments), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=120,
                          check=False)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return when `condition()` holds; fail where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def descendants(process_id: int) -> List[int]:
    """The processes that a process started, and those that they did."""
    found: List[int] = []
    for entry in os.listdir("/proc"):
        try:
            with open("/proc/%s/stat" % entry) as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process_id:
            found += [int(entry), *descendants(int(entry))]
    return found
