"""Products by SciPy's BLAS, and lending it to the Caffe whose own is old, and to no other."""
import os
import subprocess
import sys

import numpy as np
import pytest

from ddinit import blas

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Whether a later library would get its matrix products from one that is open to all.
LENT = "import ctypes; print(hasattr(ctypes.CDLL(None), 'cblas_sgemm'))"


def numbers(rows, columns):
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("left", [numbers(3, 5), numbers(5, 3).T, numbers(6, 5)[::2],
                                  numbers(3, 10)[:, ::2]],
                         ids=["rows", "columns", "strided rows", "strided columns"])
@pytest.mark.parametrize("right", [numbers(5, 4), numbers(4, 5).T, numbers(10, 4)[::2]],
                         ids=["rows", "columns", "strided"])
def test_a_product_is_numpys_however_its_factors_lie_in_memory(left, right):
    found = blas.product(left, right)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, left.astype(np.float64) @ right, rtol=1e-5, atol=1e-6)


def test_a_gram_matrix_is_the_upper_triangle_of_products_of_columns():
    rows = numbers(7, 4)
    np.testing.assert_allclose(blas.gram(rows), np.triu(rows.astype(np.float64).T @ rows),
                               rtol=1e-5, atol=1e-6)


def printed(program, **variables):
    """What a program prints in a process of its own, at the top of the project."""
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True,
                           stdout=subprocess.PIPE, env={**os.environ, **variables},
                           universal_newlines=True)
    return found.stdout.strip()


@pytest.mark.skipif(not blas._is_wheel(), reason="this Caffe is not the wheel from PyPI")
@pytest.mark.parametrize("own_blas", [False, True])
def test_the_wheel_borrows_scipys_blas_unless_told_otherwise(own_blas):
    imported = "import definitions; import_caffe(own_blas=%s); " % own_blas
    assert printed(imported + LENT) == str(not own_blas)


def test_another_caffe_keeps_its_own_blas(tmp_path):
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "__init__.py").write_text("")
    program = "import blas; blas.lend_to_caffe(); "
    assert printed(program + LENT, PYTHONPATH=str(tmp_path)) == "False"


def test_caffe_computes_the_same_with_either_blas(tmp_path):
    net = tmp_path / "net.prototxt"
    net.write_text("""
        layer { name: 'data' type: 'Input' top: 'data'
                input_param { shape { dim: 2 dim: 3 dim: 9 dim: 9 } } }
        layer { name: 'conv' type: 'Convolution' bottom: 'data' top: 'conv'
                convolution_param { num_output: 4 kernel_size: 3 } }""")
    program = """
import numpy, definitions
caffe = import_caffe(own_blas=%s)
net = caffe.Net(%r, caffe.TEST)
net.params['conv'][0].data[...] = numpy.random.default_rng(0).standard_normal((4, 3, 3, 3))
net.blobs['data'].data[...] = numpy.random.default_rng(1).standard_normal((2, 3, 9, 9))
net.forward()
print(' '.join('%%.4f' %% one for one in net.blobs['conv'].data.ravel()))"""
    lent, own = (np.array(printed(program % (value, str(net))).split(), float)
                 for value in (False, True))
    assert lent.std() > 1
    np.testing.assert_allclose(lent, own, atol=3e-4)
