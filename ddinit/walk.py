"""Visit a net layer by layer, each over all batches: the statistics of one layer set its weights
before the next can run (paper, section 3.1)."""
import tempfile
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from ddinit.net import Layer, WorkingNet, channels


class Statistics:
    """Mean and variance per channel over images and positions, gathered batch by batch.

    Sums are taken around each image's own mean and joined in float64 (Chan, Golub & LeVeque), so
    that a mean far from 0 costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: np.ndarray = np.zeros(1)
        self.squares: np.ndarray = np.zeros(1)

    def add(self, blob: np.ndarray) -> None:
        """Add a blob (n, channels, ...)."""
        rows = blob.reshape(len(blob), channels(blob.shape), -1)
        if rows.shape[2] == 1:
            rows = np.ascontiguousarray(rows.transpose(2, 1, 0))
        means = rows.mean(axis=2)
        squares = np.zeros(rows.shape[1])
        centred = np.empty_like(rows[0])
        for row, mean in zip(rows, means):
            np.subtract(row, mean[:, None], out=centred)
            squares += np.einsum("cp,cp->c", centred, centred)
        means = means.astype(np.float64)
        mean = means.mean(axis=0)
        squares += rows.shape[2] * ((means - mean) ** 2).sum(axis=0)
        count = float(rows.shape[0] * rows.shape[2])
        total = self.count + count
        step = mean - self.mean
        self.squares = self.squares + squares + step ** 2 * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    @property
    def variance(self) -> np.ndarray:
        return self.squares / self.count

    def changed(self, factor: np.ndarray, shift: np.ndarray) -> "Statistics":
        """Return the statistics of z * factor + shift, per channel."""
        changed = Statistics()
        changed.count = self.count
        changed.mean = self.mean * factor + shift
        changed.squares = self.squares * factor ** 2
        return changed

    def overall(self) -> Tuple[float, float]:
        """Return mean and variance over all channels together."""
        mean = float(self.mean.mean())
        return mean, float((self.variance + (self.mean - mean) ** 2).mean())


class BlobStore:
    """Blobs of all batches outside the net: in memory up to a limit, then in temporary files.

    A blob may carry a change z -> z * factor + shift per channel that is made when it is loaded.
    """

    def __init__(self, limit_bytes: float) -> None:
        self.free = limit_bytes
        self.spooled_bytes = 0
        self._held: Dict[Tuple[str, int], np.ndarray] = {}
        self._change: Dict[str, Tuple[np.ndarray, np.ndarray]] = {}

    def put(self, name: str, batch: int, blob: np.ndarray) -> None:
        """Keep a copy of `blob` in place of what was kept under this name and batch."""
        self.drop(name, batch)
        if blob.nbytes <= self.free:
            self.free -= blob.nbytes
            self._held[name, batch] = np.array(blob)
            return
        file = tempfile.TemporaryFile(prefix="magic_init.")  # closed with the array that maps it
        mapped = np.memmap(file, blob.dtype, "w+", shape=blob.shape)
        mapped[...] = blob
        self.spooled_bytes += blob.nbytes
        self._held[name, batch] = mapped

    def change(self, name: str, factor: np.ndarray, shift: np.ndarray) -> None:
        """Make every batch of `name` load as z * factor + shift, per channel."""
        self._change[name] = (np.asarray(factor, np.float32), np.asarray(shift, np.float32))

    def settle(self, name: str) -> None:
        """Forget the change of `name`: what is put from now on holds already."""
        self._change.pop(name, None)

    def load(self, name: str, batch: int, into: np.ndarray) -> None:
        """Write what is kept into `into`, with the blob's change."""
        held = self._held[name, batch]
        if name not in self._change:
            into[...] = held
            return
        factor, shift = (part.reshape((-1,) + (1,) * (into.ndim - 2))
                         for part in self._change[name])
        np.multiply(held, factor, out=into)
        into += shift

    def drop(self, name: str, batch: int) -> None:
        """Forget a batch of a blob."""
        held = self._held.pop((name, batch), None)
        if held is not None and not isinstance(held, np.memmap):
            self.free += held.nbytes


class Segment(NamedTuple):
    """Layers first..last that run in one go: one layer to stop at, or all up to the next such.

    `reads` are blobs that earlier segments made, `keeps` those that later ones need and
    `forgets` those that none after this one does.
    """
    first: int
    last: int
    stop: Optional[Layer]
    reads: List[str]
    keeps: List[str]
    forgets: List[str]


def segments(working: WorkingNet, stop_types: Sequence[str]) -> List[Segment]:
    """Cut a net at every layer of `stop_types` that has parameters of its own."""
    runs: List[List[Layer]] = []
    for layer in working.layers:
        if layer.type == "Input":
            continue
        if stops(layer, stop_types) or not runs or stops(runs[-1][0], stop_types):
            runs.append([])
        runs[-1].append(layer)
    reads = []
    for run in runs:
        computed: List[str] = []
        needed: List[str] = []
        for layer in run:
            needed += [blob for blob in layer.bottoms if blob not in computed]
            computed += layer.tops
        reads.append(list(dict.fromkeys(needed)))
    cut = []
    for number, run in enumerate(runs):
        later = {blob for read in reads[number + 1:] for blob in read}
        computed = list(dict.fromkeys(top for layer in run for top in layer.tops))
        cut.append(Segment(run[0].position, run[-1].position,
                           run[0] if stops(run[0], stop_types) else None, reads[number],
                           [blob for blob in computed if blob in later],
                           [blob for blob in reads[number] if blob not in later]))
    return cut


def stops(layer: Layer, stop_types: Sequence[str]) -> bool:
    """Return whether the walk stops at a layer."""
    return layer.type in stop_types and len(layer.blobs) > 0


class Stop(NamedTuple):
    """What `walk` yields: a layer before it runs (`statistics` is None), and after it has.

    `load(batch)` puts a batch of the layer's bottoms into the net.
    """
    layer: Layer
    load: Callable[[int], None]
    statistics: Optional[Statistics]


def walk(working: WorkingNet, store: BlobStore, batches: int, stop_types: Sequence[str],
         feed: Callable[[int, Any], None]) -> Iterator[Stop]:
    """Run a net layer by layer, each over all batches, stopping at every layer of `stop_types`.

    Before such a layer runs, its parameters can be set from its bottoms; after it has, its tops
    can be given a change in `store` (`BlobStore.change`) before any later layer reads them.
    `feed(batch, net)` puts a batch into the net's inputs.  A blob is kept from the layer that
    makes it to its last reader, batch by batch.
    """
    net = working.net
    kept: Set[str] = set()  # the inputs, which are not, are fed again
    for segment in segments(working, stop_types):
        def load(batch: int, segment: Segment = segment) -> None:
            if not kept.issuperset(segment.reads):
                feed(batch, net)
            for blob in segment.reads:
                if blob in kept:
                    store.load(blob, batch, net.blobs[blob].data)

        if segment.stop is not None:
            yield Stop(segment.stop, load, None)
        statistics = Statistics()
        for batch in range(batches):
            load(batch)
            for blob in segment.forgets:
                store.drop(blob, batch)
            net._forward(segment.first, segment.last)
            if segment.stop is not None:
                for top in segment.stop.tops:
                    statistics.add(net.blobs[top].data)
            for blob in segment.keeps:
                store.put(blob, batch, net.blobs[blob].data)
        kept.update(segment.keeps)
        for blob in segment.keeps:
            store.settle(blob)
        if segment.stop is not None:
            yield Stop(segment.stop, load, statistics)
