"""Write small databases of labeled images."""
from typing import Iterable, Tuple

import lmdb
import numpy as np

from image_database import MAP_BYTES, pixel_record


def write_database(path: str, images: Iterable[Tuple[np.ndarray, int]]) -> None:
    """Write images uint8 (channels, height, width) in BGR and their labels as a new database."""
    with lmdb.open(path, map_size=MAP_BYTES) as environment, \
            environment.begin(write=True) as transaction:
        for number, (pixels, label) in enumerate(images):
            image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            transaction.put(b"%08d" % number, pixel_record(image, label).data)
