"""Which BLAS multiplies matrices, and on how many threads.

A process may hold three: NumPy's, SciPy's, and one inside Caffe's wheel on PyPI.  They choose their
code by the processor, which the older ones may not know: on one of 2023 NumPy's falls back to code
of 2004 and takes five times as long as SciPy's, and the wheel's, of 2021, knows no AVX-512 at all.
Large products of ours therefore go to SciPy's (section 3.3 whitens patches, equation 2 multiplies
gradients), and so do those of Caffe's wheel, once SciPy's is lent to it.

    python -c "import numpy, blas; print(blas.product(numpy.eye(2), numpy.ones((2, 3))))"
"""
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from typing import Any, Tuple

import numpy as np
import scipy.linalg
from threadpoolctl import ThreadpoolController

# The distribution whose Caffe has a BLAS in itself.
WHEEL = "kendryte-caffe"


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left @ right (n, m) of float32 matrices (n, k) and (k, m)."""
    # BLAS counts columns first: what it is given are transposes
    first, first_turned = _by_columns(right.T)
    second, second_turned = _by_columns(left.T)
    return scipy.linalg.blas.sgemm(1.0, first, second, trans_a=first_turned,
                                   trans_b=second_turned).T


def gram(rows: np.ndarray) -> np.ndarray:
    """Return rows^T rows (d, d) of a float32 matrix (n, d); only its upper triangle is computed.

    What lies below the diagonal is 0.
    """
    return scipy.linalg.blas.ssyrk(1.0, rows.T, lower=1).T


def lend_to_caffe() -> None:
    """Let the Caffe that is about to be loaded compute with SciPy's BLAS, if it has one in itself.

    Names of a library that is open to all take precedence over a later library's own.  CaffeNet's
    forward on one thread: 5.1 s before, 3.6 s with it; loading Caffe: 0.3 s and 0.02 s.  Any other
    Caffe keeps the BLAS that it was built for.
    """
    if _is_wheel():
        # the module's libraries are opened with it: OpenCV has one of these names, too
        ctypes.CDLL(scipy.linalg.blas._fblas.__file__, mode=ctypes.RTLD_GLOBAL)


def one_thread() -> Any:
    """Return a context in which the BLAS of NumPy and SciPy computes on one thread.

    Its idle threads spin for a while and take a core from Caffe's next layer; beside threads of
    our own, and on small matrices, they take several times as long as none.
    """
    return _loaded().limit(limits=1, user_api="blas")


def _by_columns(matrix: np.ndarray) -> Tuple[np.ndarray, int]:
    """A matrix, or its transpose and 1, whichever lies column by column."""
    return (matrix, 0) if matrix.flags.f_contiguous else (matrix.T, 1)


def _is_wheel() -> bool:
    """Whether the Caffe that an import would find is the wheel from PyPI."""
    found = importlib.util.find_spec("caffe")
    try:
        wheel = importlib.metadata.distribution(WHEEL).locate_file("caffe/__init__.py")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (found is not None and found.origin is not None and os.path.exists(str(wheel))
            and os.path.samefile(found.origin, str(wheel)))


@functools.lru_cache(maxsize=None)
def _loaded() -> ThreadpoolController:
    """The BLAS libraries of this process: finding them takes milliseconds."""
    return ThreadpoolController()
