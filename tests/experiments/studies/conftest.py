"""What the tests of studies share: small images whose color tells their class."""
import numpy as np
import pytest

CLASSES = 3


@pytest.fixture
def small_images(tmp_path) -> str:
    """The path of 15 training and 6 test images of 3 classes."""
    rng = np.random.default_rng(3)
    arrays = {}
    for split, count in (("train", 5), ("test", 2)):
        labels = np.repeat(np.arange(CLASSES, dtype=np.uint8), count)
        images = rng.integers(0, 80, (len(labels), 32, 32, 3))
        images[np.arange(len(labels)), :, :, labels] += 150
        arrays.update({split + "_images": images.astype(np.uint8), split + "_labels": labels})
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")
