"""A net at work: which images it sees, what is measured on which of them, and how long it takes.

`magic_init.py` opens one session a run; the paper's two steps (sections 3.1 and 3.2) share it.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs \\
        --report out.json

writes the seconds of its phases.
"""
import argparse
import sys
import threading
import time
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

import caffe_net
import change_rates
import definitions
from caffe_net import BlobStore, WorkingNet
from change_rates import ChangeRates
from scales import ScaleGraph

# Layers that the walk stops at: those with weights, and BatchNorm for its statistics.
STOPS = tuple(sorted(caffe_net.AFFINE)) + ("BatchNorm",)


class Session:
    """A net at work: what it measures on, which images it sees, and the seconds that phases took.

    Batches 0 to `batches` - 1 of images are for statistics; change rates are measured on those in
    `measured`, at first the second half, from which no weights are made; batch `check` is held
    back from these to check a rescaled net on.
    """

    def __init__(self, arguments: argparse.Namespace, paths: Sequence[str]) -> None:
        self.rng = np.random.default_rng(arguments.seed)
        self.seconds: Dict[str, float] = {}
        self.energy: Dict[str, np.ndarray] = {}
        self.seen: Dict[str, Tuple[float, float]] = {}
        self._clock = time.perf_counter()
        self._quiet = arguments.quiet or not sys.stderr.isatty()
        caffe_net.use_device(arguments.device)
        definitions.import_caffe().set_random_seed(arguments.seed)
        self.definition = definitions.read_definition(arguments.prototxt)
        self.size, self.batches = arguments.batch_size, arguments.batches
        if paths:
            self.size, self.batches = batches_of(len(paths), self.size, self.batches)
        self.working = self.build(self.definition, bool(paths))
        self.feed: Optional[caffe_net.ImageFeed] = None
        self.check = self.batches - 1
        self.measured = list(range(self.batches - max(1, self.batches // 2), self.batches))
        if self.working.image is not None:
            chosen = self.rng.permutation(len(paths))[:(self.batches + 1) * self.size]
            self.feed = caffe_net.ImageFeed([paths[number] for number in chosen],
                                            self.working.image.shape, arguments.mean,
                                            arguments.scale)
            self.check = self.feed.batches - 1
        else:
            self.size = len(self.working.blob(self.working.outputs[0]).data)
        self.lap("set up")

    def build(self, definition: Any, with_images: bool) -> WorkingNet:
        working, image = definitions.working_definition(
            definition, self.size if with_images else None)
        definitions.spare_weight_gradients(working, change_rates.per_image)
        return WorkingNet(working, image)

    def put(self, batch: int) -> None:
        """Put a batch of images into the net."""
        assert self.feed is not None and self.working.image is not None
        self.feed.load(batch, self.working.blob(self.working.image.blob).data)

    def forward(self, batch: int) -> None:
        """Run the net on a batch of images, or on the next one of its own data layers."""
        if self.feed is not None:
            self.put(batch)
        self.working.forward()

    def _outputs(self, batch: int) -> Dict[str, Tuple[float, float]]:
        """Run the net on a batch; return mean and variance of its layers' outputs."""
        walk = caffe_net.walk(self.working, BlobStore(np.inf), 1, STOPS, lambda _: self.put(batch))
        return {stop.layer.name: stop.statistics.overall() for stop in walk if stop.statistics}

    def measure(self, graph: ScaleGraph, turn: int,
                known: Optional[ChangeRates] = None) -> ChangeRates:
        """Return the change rates on one of `measured`, at turn -1 on the last, that the net holds.

        Squared gradients go with the energy E[z^2] of their layer's input (equation 4), which the
        walk knows for all images: they count as if the batch's energy were the mean one.
        """
        batch = self.measured[turn % len(self.measured)]
        if turn >= 0 and graph.degrees:
            self.seen = self._outputs(batch)
        elif turn >= 0:
            self.forward(batch)
        rates = change_rates.measure(graph, self.rng, known)
        if self.feed is None and turn >= 0:
            return rates  # images that the walk has not seen
        energies = [self.energy[scaled.layer.name] for scaled in graph.owners()]
        factors = [energy[self.measured].mean() / energy[batch] if energy[batch] > 0 else 1.0
                   for energy in energies]
        return rates.weighted(np.array(factors))

    def lap(self, phase: str) -> None:
        """Book the seconds since the last call on a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._clock
        self._clock = now

    def bar(self, phase: str, total: int) -> Any:
        tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
        return tqdm(total=total, desc=phase, disable=self._quiet, file=sys.stderr, leave=False)


def batches_of(images: int, batch_size: int, batches: int) -> Tuple[int, int]:
    """Return size and number of batches that use as many images as were asked for and are there.

    >>> batches_of(20, 16, 10)
    (10, 2)
    """
    count = min(batches, -(-images // batch_size))
    return min(batch_size, images // count), count
