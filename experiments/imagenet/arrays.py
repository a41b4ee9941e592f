"""Read small images and their labels from an .npz file."""
import numpy as np


class ArrayImages:
    """The arrays `images`, uint8 (n, height, width, channels) in BGR, and `labels` (n,) of a file.

    Raises ValueError naming the file where it holds something else.
    """

    def __init__(self, path: str, classes: int) -> None:
        try:
            with np.load(path) as arrays:
                self._images = arrays["images"]
                self.labels = arrays["labels"].astype(np.float32)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError("%s: the file has no arrays 'images' and 'labels' (%s)"
                             % (path, error)) from error
        if self._images.dtype != np.uint8 or self._images.ndim != 4:
            raise ValueError("%s: 'images' is %s %s, not uint8 (n, height, width, channels)"
                             % (path, self._images.dtype, self._images.shape))
        if not len(self._images) or self.labels.shape != self._images.shape[:1]:
            raise ValueError("%s: there are %d images, but labels %s"
                             % (path, len(self._images), self.labels.shape))
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise ValueError("%s: the labels are %d to %d, but there are %d classes"
                             % (path, self.labels.min(), self.labels.max(), classes))

    def name(self, index: int) -> str:
        return "image %d" % index

    def read(self, index: int) -> np.ndarray:
        return self._images[index]
