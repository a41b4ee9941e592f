"""Initialize, calibrate and measure the user's own caffe.Net, in place.

Caffe computes on whatever `caffe.set_mode_gpu()` or `caffe.set_mode_cpu()` has chosen.  The work is
done on a copy of the net without losses and dropout, built from the same prototxt; its weights are
copied in and out.
"""
import zlib
from typing import Any, Dict, Iterable, Optional, Sequence, Set, Tuple

import numpy as np
from google.protobuf import text_format

from ddinit.change_rates import measure
from ddinit.net import blas_threads, copy_weights
from ddinit.session import (
    MEAN,
    TOLERANCE,
    Feed,
    Images,
    Options,
    Session,
    calibrate_session,
    open_session,
)
from ddinit.weights import KINDS
from ddinit.within import Plan, initialize_layers

# An attribute of a caffe.Net: checksums of the layers that `initialize` has set and that have no
# function to keep, as long as their weights stay what they are.
FRESH = "initialized_layers"


def initialize(net: Any, prototxt: str, images: Optional[Images] = None, kind: str = "gaussian",
               batches: int = 10, seed: int = 0, *, layers: Optional[Sequence[str]] = None,
               within: bool = True, beta: float = 0.1, mean: Any = MEAN, scale: float = 1.0,
               mem_limit: float = 3000) -> None:
    """Set a net's weights from images (paper, sections 3.3 and 3.1, Algorithm 1), in place.

    Parameters
    ----------
    net : caffe.Net of any phase
    prototxt : path of the definition that it was built from
    images : a pattern, a folder, a list of paths or an array (n, channels, height, width) of what
        the net sees; by default its own data layers feed it.  Batches are those of its blobs
    kind : of the weights, one of `KINDS`
    batches : how many batches to use
    layers : names of the layers to set; by default all
    within : scale each channel to mean `beta` and variance 1
    mean, scale : image files become (pixels - mean) * scale; mean is a number, a color in BGR, or
        a mean image or its file
    mem_limit : megabytes for blobs of all batches; what exceeds them goes to temporary files

    Raises ValueError naming layer and shapes where the input does not fit.
    """
    if kind not in KINDS:
        raise ValueError("unknown kind '%s': choose from %s" % (kind, ", ".join(KINDS)))
    unknown = sorted(set(layers or ()) - set(net.params))
    if unknown:
        raise ValueError("layer '%s' is not one of the net's with weights (%s)"
                         % (unknown[0], ", ".join(net.params)))
    session, rng = _opened(net, prototxt, images, batches, seed, Feed(mean, scale))
    fresh = set(net.params if layers is None else layers)
    with blas_threads(session.working):
        initialize_layers(session.working, session.batches, session.count,
                          Plan(fresh, kind, within, beta), rng, mem_limit * 1e6, lambda: None)
    before = fresh_layers(net)
    copy_weights(session.working.net, net)
    remember(net, fresh | before)


def calibrate(net: Any, prototxt: str, images: Optional[Images] = None, batches: int = 10,
              seed: int = 0, *, keep_function: Optional[bool] = None, alpha: float = 1.0,
              iterations: int = 10, literal: bool = False, output_std: Optional[float] = None,
              mean: Any = MEAN, scale: float = 1.0) -> Optional[str]:
    """Make all layers of a net train at one rate (section 3.2, Algorithm 2), in place.

    Parameters
    ----------
    keep_function : keep what the net computes, exactly; by default so unless `initialize` has set
        all of its layers
    alpha, iterations : damping and number of the steps of a net from scratch; alpha = 1 takes the
        exact step, the paper's schedule is 0.25 and 10
    literal : equation 2 to the letter (see `change_rates`)
    output_std : standard deviation that the outputs of a net from scratch get, by default the one
        that they have; small outputs train better (experiments/results/small_tables.md)

    The other parameters are those of `initialize`.

    Returns
    -------
    The text of another definition where the net needs one to compute with its new weights what it
    did before (LRN, BatchNorm, auxiliary Power layers), and None where its own will do.

    Raises ValueError where the function cannot be kept; the net is as it was then.
    """
    if not 0 < alpha <= 1 or iterations < 1 or not (output_std is None or 0 < output_std < np.inf):
        raise ValueError("alpha is above 0 to 1, iterations at least 1, output_std above 0: not "
                         "%r, %r, %r" % (alpha, iterations, output_std))
    session, rng = _opened(net, prototxt, images, batches, seed, Feed(mean, scale))
    fresh = fresh_layers(net)
    if keep_function is None:
        keep_function = not fresh.issuperset(layer.name for layer in session.working.affine)
    with blas_threads(session.working):
        done = calibrate_session(session, rng, keep_function,
                             Options(alpha, iterations, literal, output_std))
    if done.difference is not None and not done.difference <= TOLERANCE:
        raise ValueError("the rescaled net's outputs differ by %.2g of their standard deviation "
                         "(more than %g): the net stays as it was" % (done.difference, TOLERANCE))
    copy_weights(session.working.net, net)
    remember(net, fresh)
    return None if done.definition is None else text_format.MessageToString(done.definition)


def change_rates(net: Any, prototxt: str, images: Optional[Images] = None, batches: int = 10,
                 seed: int = 0, *, literal: bool = False, mean: Any = MEAN,
                 scale: float = 1.0) -> Dict[str, float]:
    """Return the change rate C_k of every layer with weights, by name (equation 2).

    With `literal` the squared gradient is divided by the sum of squared weights, as equation 2 is
    written, and otherwise by their mean, as the authors' released tool does.  The other parameters
    are those of `initialize`.
    """
    session, rng = _opened(net, prototxt, images, batches, seed, Feed(mean, scale))
    with blas_threads(session.working):
        return measure(session.working, session.batches, range(session.count), rng,
                       literal=literal).by_layer()


def remember(net: Any, names: Iterable[str]) -> None:
    """Note that the weights of some layers are fresh: no training has given them a function."""
    setattr(net, FRESH, {name: _checksum(net, name) for name in names})


def fresh_layers(net: Any) -> Set[str]:
    """Return the layers whose weights are still what `initialize` or `calibrate` has set."""
    return {name for name, checksum in getattr(net, FRESH, {}).items()
            if checksum == _checksum(net, name)}


def _checksum(net: Any, name: str) -> int:
    return zlib.crc32(np.ascontiguousarray(net.params[name][0].data).view(np.uint8).data)


def _opened(net: Any, prototxt: str, images: Optional[Images], batches: int, seed: int,
            feed: Feed) -> Tuple[Session, np.random.Generator]:
    """Return a session with the weights of a caffe.Net, and its random numbers."""
    if batches < 1:
        raise ValueError("batches is %r: at least one is needed" % (batches,))
    rng = np.random.default_rng(seed)
    session = open_session(prototxt, images, None, batches, rng, feed, net=net)
    copy_weights(net, session.working.net)
    return session, rng
