"""Choose learning rates by validation accuracy."""
from typing import Any, Dict, List, Optional, Sequence


def trials_of(row: Any, trials: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the trials of a row, which is known by its name and column."""
    return [trial for trial in trials if (trial["row"], trial["column"]) == (row.name, row.column)]


def best_rates(row: Any, trials: Sequence[Dict[str, Any]]) -> List[float]:
    """Return the learning rates of a row, best first, among those that were tried most often.

    The best has the highest mean validation accuracy; of equals it is the smaller one. A trial that
    diverged counts as 0, and rates of which all trials diverged are left out.
    """
    tried: Dict[float, List[Optional[float]]] = {}
    for trial in trials_of(row, trials):
        tried.setdefault(trial["learning_rate"], []).append(trial["validation_accuracy"])
    most = max((len(accuracies) for accuracies in tried.values()), default=0)
    means = {rate: sum(value or 0.0 for value in accuracies) / most
             for rate, accuracies in tried.items()
             if len(accuracies) == most and any(value is not None for value in accuracies)}
    return sorted(means, key=lambda rate: (-means[rate], rate))


def is_extreme(row: Any, rate: float, trials: Sequence[Dict[str, Any]]) -> bool:
    """Return whether a learning rate is the smallest or the largest that was tried."""
    tried = {trial["learning_rate"] for trial in trials_of(row, trials)}
    return len(tried) > 1 and rate in (min(tried), max(tried))


def next_rate(best: Sequence[float], trials: Sequence[Dict[str, Any]], row: Any) -> List[float]:
    """Return the learning rate beyond the best one, if the best one is the last on its side.

    Where all trials diverged, it is the one below the smallest.
    """
    tried = sorted({trial["learning_rate"] for trial in trials_of(row, trials)})
    if not best or best[0] == tried[0]:
        return [beyond(tried[0], -1)]
    return [beyond(tried[-1], 1)] if best[0] == tried[-1] else []


def beyond(rate: float, step: int) -> float:
    """Return the next of ..., 0.001, 0.003, 0.01, 0.03, ... above (1) or below (-1) a rate."""
    steps = [float("%de%d" % (digit, exponent)) for exponent in range(-12, 4) for digit in (1, 3)]
    if step > 0:
        return next(other for other in steps if other > rate * 1.0001)
    return next(other for other in reversed(steps) if other < rate * 0.9999)
