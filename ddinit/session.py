"""A net at work: who works on which images, what is measured on them, and how long it takes.

`magic_init.py` opens one session a run; the paper's two steps (sections 3.1 and 3.2) share it.

    python magic_init.py models/caffenet_tiny/deploy.prototxt out.caffemodel -d 'photos/*' -cs \\
        --report out.json

writes the seconds of its phases.
"""
import argparse
import functools
import sys
import threading
import time
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from ddinit import caffe_net, caffemodel, change_rates, crew, processes
from ddinit.caffe_net import BlobStore, Statistics, Stop, WorkingNet
from ddinit.change_rates import ChangeRates
from ddinit.crew import Crew
from ddinit.prototxt import (
    import_caffe,
    mixing_layer,
    read_definition,
    spare_weight_gradients,
    working_definition,
)
from ddinit.scales import ScaleGraph

# Layers that the walk stops at: those with weights, and BatchNorm for its statistics.
STOPS = tuple(sorted(caffe_net.AFFINE)) + ("BatchNorm",)


class Session:
    """A net at work: what it measures on, which images it sees, and the seconds that phases took.

    Batches 0 to `batches` - 1 of images are for statistics; change rates are measured on those in
    `measured`, at first the second half, from which no weights are made; batch `check` is held
    back from these to check a rescaled net on.  Every process of a crew has a session of its own,
    with its part of each batch; all draw the same random numbers.
    """

    def __init__(self, own: Crew, definition: Any, arguments: argparse.Namespace,
                 paths: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.crew = own
        self.notes = list(notes)
        self.rng = np.random.default_rng(arguments.seed)
        self.seconds: Dict[str, float] = {}
        self.energy: Dict[str, np.ndarray] = {}
        self.seen: Dict[str, Tuple[float, float]] = {}
        self._clock = time.perf_counter()
        self._quiet = arguments.quiet or not sys.stderr.isatty() or not own.first
        caffe_net.use_device(arguments.device)
        import_caffe().set_random_seed(arguments.seed)
        self.definition = definition
        self.size, self.batches = batches_of(len(paths), arguments.batch_size, arguments.batches)
        self.working = self.build(self.definition, bool(paths))
        self.feed: Optional[caffe_net.ImageFeed] = None
        self.check = self.batches - 1
        self.measured = list(range(self.batches - max(1, self.batches // 2), self.batches))
        if self.working.image is not None:
            whole = min(len(paths) // self.size, self.batches + 1) * self.size
            chosen = self.rng.permutation(len(paths))[:whole].reshape(-1, self.size)
            self.feed = caffe_net.ImageFeed(
                [paths[number] for number in chosen[:, own.own(self.size)].ravel()],
                self.working.image.shape, arguments.mean, arguments.scale)
            self.check = self.feed.batches - 1
        else:
            self.size = len(self.working.blob(self.working.outputs[0]).data)
        self.lap("set up")

    def build(self, definition: Any, with_images: bool) -> WorkingNet:
        working, image = working_definition(
            definition, self.size // self.crew.size if with_images else None)
        spare_weight_gradients(working, change_rates.per_image)
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

    def joined(self, stop: Stop) -> Tuple[Statistics, np.ndarray]:
        """Return a stop's statistics and energy over the images of the whole crew."""
        found = self.crew.gather((stop.statistics, stop.energy))
        return (functools.reduce(Statistics.joined, [statistics for statistics, _ in found]),
                np.sum([energy for _, energy in found], axis=0))

    def save(self, path: str) -> None:
        """Write the net's weights, which all of the crew hold, once; return when they are there."""
        if self.crew.first:
            caffemodel.write(self.working.net, self.working.definition, path)
        self.crew.gather(None)

    def _outputs(self, batch: int) -> Dict[str, Tuple[float, float]]:
        """Run the net on a batch; return mean and variance of its layers' outputs."""
        walk = caffe_net.walk(self.working, BlobStore(np.inf), 1, STOPS, lambda _: self.put(batch))
        return {stop.layer.name: self.joined(stop)[0].overall() for stop in walk if stop.statistics}

    def measure(self, graph: ScaleGraph, turn: int, known: Optional[ChangeRates] = None,
                losses: int = change_rates.LOSSES) -> ChangeRates:
        """Return the change rates on one of `measured`, at turn -1 on the last, that the net holds.

        Squared gradients go with the energy E[z^2] of their layer's input (equation 4), which the
        walk knows for all images: they count as if the batch's energy were the mean one.
        """
        batch = self.measured[turn % len(self.measured)]
        if turn >= 0 and graph.degrees:
            self.seen = self._outputs(batch)
        elif turn >= 0:
            self.forward(batch)
        rates = change_rates.measure(graph, self.rng, known, self.crew, losses)
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

    Without images, where a net feeds itself, they stay what they are.

    >>> batches_of(20, 16, 10)
    (10, 2)
    """
    if not images:
        return batch_size, batches
    count = min(batches, -(-images // batch_size))
    return min(batch_size, images // count), count


def in_crew(function: Callable[..., Any], arguments: argparse.Namespace, paths: Sequence[str],
            output: str) -> Any:
    """Return function(session, arguments, output), run by as many processes as can share the work.

    One, where Caffe computes on a GPU, reads its own data, or has layers in which images meet.
    """
    size, available = 1, crew.threads()
    if paths and arguments.device is None and processes.may_fork():
        batch_size, _ = batches_of(len(paths), arguments.batch_size, arguments.batches)
        size = crew.processes(batch_size, arguments.processes)
    if size > 1:
        # before Caffe is loaded
        crew.limit_threads(max(1, min(available, crew.processors() // size)))
    definition = read_definition(arguments.prototxt)
    mixing = mixing_layer(
        working_definition(definition, 1)[0]) if size > 1 else None
    notes = []
    if mixing is not None:
        notes.append("one process does all: images of a batch may meet in layer %s" % mixing)
        size = 1
        crew.limit_threads(available)

    def work(own: Crew) -> Any:
        return function(Session(own, definition, arguments, paths, notes), arguments, output)
    return crew.together(size, work)
