"""Train nets with pycaffe solvers, resumably: the one loop of all experiments (section 4).

Describe a run as a `Plan`, and call `train(plan)`, or `run(plan)` for a command, in a process that
Caffe may abort (`processes.in_child`).

What feeds the net is part of the net: data layers, or Python layers such as ImageSource. The loop
calls `begin(batch)` of a Python layer before the first step, with the number of batches that the
run has used before, and `close()` in the end.
"""
import contextlib
import logging
import math
import os
import signal
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from google.protobuf import text_format
from tqdm import tqdm

from ddinit import files, results
from ddinit.caffemodel import load_weights
from ddinit.net import copy_weights, use_device
from ddinit.prototxt import build_net, caffe_messages, check_types, import_caffe, write_definition
from training import curve, nets, run_folder
from training.starts import check_filled

LOG_SECONDS = 60  # between two lines of progress where there is no terminal


class Measurement(NamedTuple):
    """What curves.csv holds: values measured at iteration 0, every `every` iterations, and the end.

    net       NetParameter of the TEST phase; its layers get the weights of the training net's
              layers of the same names
    every     iterations between two measurements
    measure   function from the caffe.Net of `net`, and the rows of log.csv since the measurement
              before, to named numbers, always of the same names
    """
    net: Any
    every: int
    measure: Callable[[Any, List[Dict[str, float]]], Dict[str, float]]


class Folding(NamedTuple):
    """How the weights in files differ from those that are trained.

    fold     changes the weights of a caffe.Net before each file is written
    unfold   undoes it; a resumed run unfolds what it loads
    """
    fold: Callable[[Any], None]
    unfold: Callable[[Any], None]


class Plan(NamedTuple):
    """A training run.

    net              NetParameter of the TRAIN phase, with what feeds it and its losses
    solver           SolverParameter: type, base_lr, lr_policy, momentum, weight_decay, ...; net,
                     snapshots, display, max_iter and random_seed are set here
    folder           output folder, made where it is missing; see run_folder
    iterations       number of iterations
    seed             of fillers and, by iteration, of dropout; data layers have their own
    weights          caffemodel to start from; None: the fillers of the net
    fresh            layers that are not loaded from `weights`
    snapshot_every   iterations between snapshots; 0: only when the run is stopped
    resume           whether to continue from the last snapshot in the folder
    gpu              the GPU to compute on; None: the CPU
    settings         JSON values that are also needed to repeat the run; a run cannot be resumed
                     with others, but for those in "paths"
    measurement      see Measurement
    folding          see Folding
    """
    net: Any
    solver: Any
    folder: str
    iterations: int
    seed: int = 0
    weights: Optional[str] = None
    fresh: Sequence[str] = ()
    snapshot_every: int = 0
    resume: bool = False
    gpu: Optional[int] = None
    settings: Dict[str, Any] = {}
    measurement: Optional[Measurement] = None
    folding: Optional[Folding] = None


class Outcome(NamedTuple):
    """How a run ended.

    iteration    iterations done
    loss         the last loss; None where nothing was left to do
    stopped_by   the signal that stopped the run, or None
    measured     the rows of curves.csv
    """
    iteration: int
    loss: Optional[float]
    stopped_by: Optional[int]
    measured: List[Dict[str, float]]


def train(plan: Plan) -> Outcome:
    """Train as planned; unless a signal comes, `plan.folder` holds final.caffemodel in the end.

    Raises ValueError naming the file, layer and shapes where the plan cannot be carried out, and
    naming the iteration where a loss is not finite.
    """
    _check(plan)
    plan = _with_batch_statistics(plan)
    os.makedirs(plan.folder, exist_ok=True)
    repeat = _what_repeats(plan)
    if plan.resume:
        run_folder.check_same_run(plan.folder, repeat)
        if run_folder.is_finished(plan.folder, plan.iterations):
            logging.info("%s is finished", plan.folder)
            return Outcome(plan.iterations, None, None, run_folder.measured(plan.folder))
    snapshot = _starting_point(plan)
    solver_file = _write_definitions(plan)
    use_device(plan.gpu)
    solver = import_caffe().get_solver(solver_file)
    _load(plan, solver, snapshot)
    run = _Run(plan, solver, repeat)
    try:
        return run.go()
    finally:
        run.close()


def run(plan: Plan) -> int:
    """Train as planned for a command; return 0, or 128 + the signal that stopped the run."""
    outcome = train(plan)
    if outcome.stopped_by is None:
        logging.info("wrote %s", os.path.join(plan.folder, "final.caffemodel"))
        return 0
    logging.warning("stopped by %s after iteration %d of %d; the same command with --resume "
                    "continues the run in %s", signal.Signals(outcome.stopped_by).name,
                    outcome.iteration, plan.iterations, plan.folder)
    return 128 + outcome.stopped_by


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------

class _Run:
    """A run in progress: `go` steps the solver to the end and writes the files of the run."""

    def __init__(self, plan: Plan, solver: Any, repeat: Dict[str, Any]) -> None:
        self.plan = plan
        self.solver = solver
        self.repeat = repeat
        self.losses = _loss_blobs(solver.net)
        self.values = [*self.losses, *[  # such as the top of an Accuracy layer
            name for name in solver.net.outputs
            if name not in self.losses and solver.net.blobs[name].count == 1]]
        self.batch = _batch_size(solver.net) * plan.solver.iter_size
        self.log = run_folder.Table(os.path.join(plan.folder, "log.csv"), solver.iter)
        self.curves: Optional[run_folder.Table] = None
        self.measured_net: Any = None
        self.recent: List[Dict[str, float]] = []
        if plan.measurement is not None:
            self.curves = run_folder.Table(os.path.join(plan.folder, "curves.csv"), solver.iter)
            self.measured_net = build_net(plan.measurement.net)
            before = self.curves.last.get("iteration", 0)
            self.recent = [row for row in run_folder.read_table(self.log.path)
                           if row["iteration"] > before]
        self.seconds_before = float(self.log.last.get("seconds", 0.0))
        self.started = time.monotonic()

    def go(self) -> Outcome:
        plan, solver = self.plan, self.solver
        first, loss = solver.iter, None
        self._write_run(None)
        for layer in _feeding(solver.net):
            layer.begin(first * plan.solver.iter_size)
        with _signals() as received, _progress(plan, first, self.batch) as show:
            if first == 0:
                self._measure()
            while solver.iter < plan.iterations and not received:
                if solver.iter == first or plan.gpu is None:
                    _reseed(plan.seed, solver.iter)
                solver.step(1)
                loss = self._log()
                if self._due(plan.measurement.every if plan.measurement else 0):
                    self._measure()
                if plan.snapshot_every and solver.iter % plan.snapshot_every == 0:
                    self._snapshot()
                show(solver.iter, loss)
            stopped_by = received[0] if received and solver.iter < plan.iterations else None
        return self._end(loss, stopped_by)

    def close(self) -> None:
        for layer in _feeding(self.solver.net):
            layer.close()
        self.log.close()
        if self.curves is not None:
            self.curves.close()
        run_folder.remove_hidden(self.plan.folder)

    def _end(self, loss: Optional[float], stopped_by: Optional[int]) -> Outcome:
        last = run_folder.last_snapshot(self.plan.folder)
        if stopped_by is not None:
            if last is None or last.iteration != self.solver.iter:
                self._snapshot()
        else:
            self._save_weights(os.path.join(self.plan.folder, "final.caffemodel"))
        curve.draw(self.plan.folder)
        outcome = Outcome(self.solver.iter, loss, stopped_by,
                          run_folder.measured(self.plan.folder))
        self._write_run(outcome)
        return outcome

    def _due(self, every: int) -> bool:
        return bool(every) and (self.solver.iter % every == 0
                                or self.solver.iter == self.plan.iterations)

    def _log(self) -> float:
        """Append the losses and other outputs of the last step to log.csv; return the loss.

        The loss is the weighted sum. Raises ValueError naming the iteration where it is not finite.
        """
        net = self.solver.net
        values = {name: float(net.blobs[name].data.sum()) for name in self.values}
        loss = math.fsum(weight * values[name] for name, weight in self.losses.items())
        rate = learning_rate(self.plan.solver, self.solver.iter - 1, self.plan.iterations)
        if not math.isfinite(loss):
            self._write_run(None, diverged=self.solver.iter)
            raise ValueError("In iteration %d the loss is %s at a learning rate of %g. Use a "
                             "smaller rate. The losses so far are in %s."
                             % (self.solver.iter, loss, rate, self.log.path))
        row: Dict[str, float] = {"iteration": self.solver.iter,
                                 "learning_rate": float("%.7g" % rate), "loss": loss}
        if len(values) > 1:
            row.update(values)
        row["seconds"] = round(self.seconds_before + time.monotonic() - self.started, 3)
        self.log.add(row)
        if self.curves is not None:
            self.recent.append(row)
        return loss

    def _measure(self) -> None:
        if self.plan.measurement is None or self.curves is None:
            return
        copy_weights(self.solver.net, self.measured_net)
        values = self.plan.measurement.measure(self.measured_net, self.recent)
        self.recent = []
        self.curves.add({"iteration": self.solver.iter,
                         **{name: float(value) for name, value in values.items()}})

    def _snapshot(self) -> None:
        self.log.to_disk()
        if self.curves is not None:
            self.curves.to_disk()
        with self._folded():
            run_folder.save_snapshot(self.solver, self.plan.folder)

    def _save_weights(self, path: str) -> None:
        with self._folded(), files.replacing(path) as temporary:
            self.solver.net.save(temporary)

    @contextlib.contextmanager
    def _folded(self) -> Iterator[None]:
        if self.plan.folding is not None:
            self.plan.folding.fold(self.solver.net)
        yield
        if self.plan.folding is not None:
            self.plan.folding.unfold(self.solver.net)

    def _write_run(self, outcome: Optional[Outcome], diverged: Optional[int] = None) -> None:
        plan = self.plan
        record = {
            **results.provenance(plan.seed),
            "repeat": self.repeat,
            "iterations": plan.iterations,
            "snapshot_every": plan.snapshot_every,
            "gpu": plan.gpu,
            "solver": text_format.MessageToString(plan.solver),
            "net_sha256": run_folder.sha256(os.path.join(plan.folder, "train_val.prototxt")),
        }
        if diverged is not None:
            record["diverged"] = diverged
        if outcome is not None:
            record.update(finished=outcome.stopped_by is None, iteration=outcome.iteration,
                          loss=outcome.loss,
                          seconds=self.seconds_before + time.monotonic() - self.started)
        results.write_json(os.path.join(plan.folder, "run.json"), record)


@contextlib.contextmanager
def _signals() -> Iterator[List[int]]:
    """Collect SIGINT and SIGTERM in a list; the same signal again interrupts at once."""
    received: List[int] = []

    def note(number: int, _: Any) -> None:
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(plan: Plan, first: int, batch: int) -> Iterator[Callable[[int, float], None]]:
    """Show loss, images/s and the time left: as a bar on a terminal, else as a line a minute."""
    started = shown = time.monotonic()
    tqdm.set_lock(threading.RLock())  # its default, a semaphore, outlives a process that aborts
    with tqdm(total=plan.iterations, initial=first, unit=" images", unit_scale=batch,
              disable=None, dynamic_ncols=True) as bar:
        def show(iteration: int, loss: float) -> None:
            nonlocal shown
            if not bar.disable:
                bar.set_postfix_str("loss %.4g" % loss, refresh=False)
                bar.update(iteration - bar.n)
                return
            now = time.monotonic()
            if now - shown >= LOG_SECONDS or iteration == plan.iterations:
                shown = now
                speed = (iteration - first) / (now - started)
                logging.info("iteration %d of %d: loss %.4g, %.1f images/s, %d s left", iteration,
                             plan.iterations, loss, speed * batch,
                             (plan.iterations - iteration) / speed)
        yield show


def _reseed(seed: int, iteration: int) -> None:
    """Make what Caffe draws from now on (dropout) a function of seed and iteration.

    The CPU does so before each iteration, so that a resumed run is bitwise the same. GPUs do not
    repeat sums to the bit anyway, and take long to seed.
    """
    import_caffe().set_random_seed(_caffe_seed(seed, 1 + iteration))


def _caffe_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def _loss_blobs(net: Any) -> Dict[str, float]:
    """Return the blobs that the loss is the sum of, with their weights."""
    losses = {name: float(weight) for name, weight in net.blob_loss_weights.items() if weight}
    if not losses:
        raise ValueError("The training net has no loss.")
    return losses


def _batch_size(net: Any) -> int:
    """Return the number of images in a batch: the first axis of the first blob."""
    shape = next(iter(net.blobs.values())).shape
    return int(shape[0]) if len(shape) else 1


def _feeding(net: Any) -> List[Any]:
    return [layer for layer in net.layers if hasattr(layer, "begin")]


# ---------------------------------------------------------------------------------------------
# Before the first step
# ---------------------------------------------------------------------------------------------

def learning_rate(solver: Any, iteration: int, iterations: int) -> float:
    """Return the learning rate of an iteration, counted from 0, by Caffe's lr_policy.

    Raises ValueError for a policy that Caffe does not have or that lacks its step size.
    """
    policy, rate, gamma = solver.lr_policy, solver.base_lr, solver.gamma
    if policy == "step" and solver.stepsize < 1:
        raise ValueError("The lr_policy 'step' needs a stepsize of at least 1.")
    if policy == "fixed":
        return rate
    if policy == "step":
        return rate * gamma ** (iteration // solver.stepsize)
    if policy == "multistep":
        return rate * gamma ** sum(iteration >= step for step in solver.stepvalue)
    if policy == "exp":
        return rate * gamma ** iteration
    if policy == "inv":
        return rate * (1 + gamma * iteration) ** -solver.power
    if policy == "poly":
        return rate * (1 - iteration / iterations) ** solver.power
    if policy == "sigmoid":
        return rate / (1 + math.exp(-gamma * (iteration - solver.stepsize)))
    raise ValueError("Caffe has no lr_policy '%s'." % policy)


def _with_batch_statistics(plan: Plan) -> Plan:
    net = nets.repaired(plan.net)
    if net is not plan.net:
        logging.info("The BatchNorm layer of this Caffe does not normalize by the batch; a Python "
                     "layer replaces it.")
    return plan._replace(net=net)


def _check(plan: Plan) -> None:
    check_types(plan.net)
    if plan.iterations < 1:
        raise ValueError("The number of iterations must be at least 1, not %d." % plan.iterations)
    if not 0 <= plan.seed < 2 ** 31:
        raise ValueError("The seed must be in 0..2147483647, not %d." % plan.seed)
    learning_rate(plan.solver, 0, plan.iterations)


def _starting_point(plan: Plan) -> Optional[run_folder.Snapshot]:
    """Return the snapshot to resume from.

    Raises ValueError where a run that is not to be resumed would be overwritten.
    """
    snapshot = run_folder.last_snapshot(plan.folder)
    if not plan.resume:
        earlier = snapshot or os.path.exists(os.path.join(plan.folder, "final.caffemodel"))
        if earlier:
            raise ValueError("%s holds a run already. Continue it with --resume, or use another "
                             "folder." % plan.folder)
    elif snapshot is None:
        logging.info("%s holds no snapshot; the run starts at iteration 0", plan.folder)
    else:
        logging.info("resuming from iteration %d", snapshot.iteration)
    return snapshot


def _what_repeats(plan: Plan) -> Dict[str, Any]:
    """Return the settings that a run must share with the one that it resumes, and paths."""
    weights = plan.weights and os.path.abspath(plan.weights)
    return {
        **plan.settings,
        "paths": {**plan.settings.get("paths", {}), "weights": weights},
        "seed": plan.seed,
        "weights_sha256": plan.weights and run_folder.sha256(plan.weights),
        "fresh": list(plan.fresh),
    }


def _write_definitions(plan: Plan) -> str:
    """Write train_val.prototxt and solver.prototxt; return a solver file with absolute paths."""
    net = os.path.join(plan.folder, "train_val.prototxt")
    write_definition(plan.net, net)
    solver = caffe_messages().SolverParameter()
    solver.CopyFrom(plan.solver)
    solver.net = os.path.basename(net)
    solver.max_iter = plan.iterations
    solver.random_seed = _caffe_seed(plan.seed, 0)
    solver.display = 0
    solver.snapshot = 0
    solver.snapshot_prefix = "snapshot"
    write_definition(solver, os.path.join(plan.folder, "solver.prototxt"),
                                 "Paths are relative to this folder.")
    run_folder.make_hidden(plan.folder)
    solver.net = os.path.abspath(net)
    solver.snapshot_prefix = run_folder.snapshot_prefix(plan.folder)
    hidden = os.path.join(os.path.dirname(solver.snapshot_prefix), "solver.prototxt")
    write_definition(solver, hidden)
    return hidden


def _load(plan: Plan, solver: Any, snapshot: Optional[run_folder.Snapshot]) -> None:
    if snapshot is not None:
        run_folder.restore_snapshot(solver, snapshot)
        if plan.folding is not None:
            plan.folding.unfold(solver.net)
    elif plan.weights is not None:
        left = load_weights(solver.net, plan.weights, plan.fresh)
        if left:
            logging.info("layers not loaded from %s, but filled: %s", plan.weights,
                         ", ".join(left))
        check_filled(plan.net, left)
    else:
        check_filled(plan.net, list(solver.net.params))
