"""What Caffe Python layers that feed a net from a Prefetcher have in common.

`setup` of a layer makes `self.batches`, `forward` asks for `self.next_batch()`; training.py calls
`begin` and `close`, Caffe's own tools neither.

    python experiments/classify_voc.py train models/caffenet/deploy.prototxt caffenet.caffemodel \\
        build/voc --voc datasets/VOCdevkit/VOC2007
"""
from typing import Any, List

import numpy as np

from ddinit.prototxt import import_caffe
from prefetch import Prefetcher

caffe: Any = import_caffe()


class DataLayer(caffe.Layer):
    """Batch k of a run is a function of (seed, k); with several solvers each takes its own batches
    of the same sequence.  Python errors reach whoever steps the solver."""

    batches: Prefetcher
    started = False

    def begin(self, batch: int) -> None:
        """Start at the batch that follows the first `batch` batches of a run."""
        count = max(1, caffe.solver_count())
        self.batches.start(batch * count + caffe.solver_rank(), count)
        self.started = True

    def close(self) -> None:
        """End the workers."""
        self.batches.close()
        self.started = False

    def next_batch(self) -> List[np.ndarray]:
        """The arrays of the next batch, from the run's first where nobody called begin()."""
        if not self.started:
            self.begin(0)
        return self.batches.next()

    def backward(self, *_: Any) -> None:
        """Data has no gradient."""
