"""Find the nearest vectors of a pool by exhaustive search (figure 2)."""
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np

CHUNK_BYTES = 1 << 26  # of the pool that are in memory at a time


class Neighbours(NamedTuple):
    """The neighbors of each query, the nearest first.

    places       (queries, k), indices into the pool
    similarity   (queries, k), cosines
    """

    places: np.ndarray
    similarity: np.ndarray


def nearest(queries: np.ndarray, pool: Sequence[np.ndarray], k: int,
            excluded: Optional[Sequence[np.ndarray]] = None) -> Neighbours:
    """Return the k rows of the pool with the largest cosine q p / (|q| |p|) for each query.

    queries    (queries, d)
    pool       parts (rows, d) of any float type, memory-mapped where they exceed the memory
    excluded   indices into the pool that do not count, for each query

    The search is in float32; of equally similar rows the first counts. A row of NaN is not found,
    and a row of zeros has cosine 0 with all. Raises ValueError where the pool has another d, or
    fewer rows than are asked for.
    """
    _check_pool(queries, pool, k)
    unit = _unit(np.asarray(queries, np.float32))
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in unit]
    start = 0
    for part in pool:
        rows = max(1, CHUNK_BYTES // (4 * part.shape[1]))
        for first in range(0, len(part), rows):
            cosine = unit @ _unit(np.asarray(part[first:first + rows], np.float32)).T
            cosine[np.isnan(cosine)] = -np.inf
            for query, row in enumerate(cosine):
                if excluded is not None:
                    inside = excluded[query] - start
                    row[inside[(inside >= 0) & (inside < len(row))]] = -np.inf
                best[query] = _merged(best[query], row, start, k)
            start += cosine.shape[1]
    for query, (found, similarity) in enumerate(best):
        if len(found) < k or similarity[-1] == -np.inf:
            raise ValueError("Query %d: the pool has fewer than %d other images that can be read."
                             % (query, k))
    places = np.array([found for found, _ in best])
    return Neighbours(places, np.array([similarity for _, similarity in best]))


def _check_pool(queries: np.ndarray, pool: Sequence[np.ndarray], k: int) -> None:
    for part in pool:
        if part.shape[1] != queries.shape[1]:
            raise ValueError("Features have %d values in the pool, but %d in the queries."
                             % (part.shape[1], queries.shape[1]))
    if sum(len(part) for part in pool) < k:
        raise ValueError("%d neighbors cannot be found in a pool of %d images."
                         % (k, sum(len(part) for part in pool)))


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return rows divided by their lengths; rows of zeros stay."""
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    lengths[lengths == 0] = 1
    return rows / lengths[:, None]


def _merged(best: Tuple[np.ndarray, np.ndarray], row: np.ndarray, start: int,
            k: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return the k best of `best` and of `row`, which begins at index `start` of the pool."""
    found, similarity = best
    better = np.arange(len(row)) if len(found) < k else np.flatnonzero(row > similarity[-1])
    if not len(better):
        return best
    found = np.concatenate([found, better + start])
    similarity = np.concatenate([similarity, row[better]])
    order = np.lexsort((found, -similarity))[:k]
    return found[order], similarity[order]
