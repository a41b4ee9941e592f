"""Limited labels in small: tables 1 and 2 of the paper on a few thousand small images.

    python experiments/study.py --data cifar10_mini.npz --out build/study

trains a small net in CaffeNet's image from every initialisation of experiments/study.yaml, several
times each, at the learning rate with which it does best on images held back from training.

OUT/study.json has every trial, OUT/study.csv and study.md the table (test accuracy in %, mean and
standard error over seeds), OUT/study.png the learning curves.  OUT/trials holds the runs: given
again, the command goes on, and repeats nothing that is finished.
"""
import argparse
import concurrent.futures
import logging
import os
import subprocess
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import yaml  # type: ignore[import-untyped]

import study_data
import study_report
import training_net
from cells import METHODS, SCALINGS
from ddinit import processes, results
from ddinit.prototxt import image_layers, read_definition, write_definition
from run_folder import sha256
from study_trial import Trial, finished, run_trial

log = logging.getLogger("study")

HERE = os.path.dirname(os.path.abspath(__file__))
# Keys of the configuration and their types; numbers must be positive, `pad` may be 0.
KEYS: Dict[str, Any] = {
    "net": str, "validation_images": int, "initialisation_images": int, "iterations": int,
    "batch_size": int, "momentum": float, "weight_decay": float, "clip_gradients": float,
    "pad": int, "measure_every": int, "learning_rates": list, "seeds": list,
    "initialisations": dict}
MAY_BE_ZERO = ("pad", "momentum", "weight_decay")
FINALISTS = 2  # learning rates of a row that are tried with all seeds
ROW_KEYS = {"method", "scaling", "tables"}


class Initialisation(NamedTuple):
    """A row of the result: method and scaling of initialise.py, and the paper's tables."""

    name: str
    method: str
    scaling: str
    tables: Sequence[int]


class Study(NamedTuple):
    """Everything a trial needs: the configuration's `settings`, its rows, and where files are."""

    settings: Dict[str, Any]
    rows: Sequence[Initialisation]
    definition: str
    out: str


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the study; return the exit status."""
    parser = processes.Parser(prog="study.py", description=__doc__.splitlines()[0])
    study_data.add_arguments(parser)
    parser.add_argument("--config", metavar="FILE.yaml", default=os.path.join(HERE, "study.yaml"),
                        help="what to run (default: study.yaml beside this script)")
    arguments = parser.parse_args(argv)
    processes.log_to_stderr()
    return processes.command_line(lambda given: _run(given, argv), arguments, parser.prog)


def _run(arguments: argparse.Namespace, argv: Optional[Sequence[str]]) -> None:
    settings, rows = read_configuration(arguments.config)
    study = prepare(arguments.data, settings, rows, arguments.out)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a core for each of the children
    trials = run_all(study, arguments.jobs)
    study_report.write(study.rows, trials, study.settings["measure_every"], arguments.out, {
        **results.provenance(None, argv), "settings": study.settings})
    with open(os.path.join(arguments.out, "study.md"), encoding="utf-8") as file:
        print(file.read(), end="")


# ---------------------------------------------------------------------------------------------
# Configuration and data
# ---------------------------------------------------------------------------------------------

def read_configuration(path: str) -> Any:
    """Return settings (dict) and rows (list of Initialisation) from a YAML file.

    Raises ValueError naming the file and the key that is unknown, missing or wrong.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError("%s: cannot read the configuration (%s)" % (path, error)) from error
    if not isinstance(config, dict):
        raise ValueError("%s: not a configuration of study.py" % path)
    for key in config:
        if key not in KEYS:
            raise ValueError("%s: unknown key '%s'" % (path, key))
    for key, kind in KEYS.items():
        if key not in config:
            raise ValueError("%s: '%s' is missing" % (path, key))
        _check_value(path, key, config[key], kind)
    for rate in config["learning_rates"]:
        _check_value(path, "learning_rates", rate, float)
    for seed in config["seeds"]:
        if type(seed) is not int or seed < 0:
            raise ValueError("%s: seeds: %r is not a whole number from 0" % (path, seed))
    rows = [_row(path, name, row) for name, row in config.pop("initialisations").items()]
    config["net"] = os.path.join(os.path.dirname(os.path.abspath(path)), config["net"])
    return config, rows


def _check_value(path: str, key: str, value: Any, kind: Any) -> None:
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds or (kind in (list, dict, str) and not value):
        raise ValueError("%s: '%s' is %r, not a %s" % (path, key, value, {
            int: "whole number", float: "number", str: "text", list: "list",
            dict: "mapping"}[kind]))
    if kind in (int, float) and not (value > 0 or (value == 0 and key in MAY_BE_ZERO)):
        raise ValueError("%s: '%s' is %r, not above 0" % (path, key, value))


def _row(path: str, name: str, row: Any) -> Initialisation:
    where = "%s: initialisations: '%s'" % (path, name)
    if not isinstance(name, str) or "/" in name or name.startswith("."):
        raise ValueError("%s: a name is text that can be a folder's" % where)
    if not isinstance(row, dict) or set(row) != ROW_KEYS:
        raise ValueError("%s needs the keys %s and no others"
                         % (where, ", ".join(sorted(ROW_KEYS))))
    if row["method"] not in METHODS or row["scaling"] not in SCALINGS:
        raise ValueError("%s: method and scaling must be of %s and of %s"
                         % (where, ", ".join(METHODS), ", ".join(SCALINGS)))
    tables = row["tables"]
    if not isinstance(tables, list) or not tables or not set(tables) <= {1, 2}:
        raise ValueError("%s: tables are a list of 1 and 2" % where)
    return Initialisation(name, row["method"], row["scaling"], tables)


def prepare(path: str, settings: Dict[str, Any], rows: Sequence[Initialisation],
            out: str) -> Study:
    """Lay out the data and the net for its classes below `out`, where they are not there yet.

    Raises ValueError where data and net do not fit.
    """
    data = study_data.read(path)
    read = read_definition(settings["net"])
    layers, image = image_layers(read, 1)
    assert image is not None  # because we asked for a batch of 1
    if tuple(image.shape[1:]) != (3,) + data.train_images.shape[1:3]:
        raise ValueError("%s: images of %d x %d pixels, %s takes %s" % (
            path, *data.train_images.shape[1:3], settings["net"], image.shape[1:]))
    last = [layer for layer in read.layer if layer.name in {one.name for one in layers}
            and layer.type in training_net.AFFINE][-1]
    getattr(last, training_net.AFFINE[last.type]).num_output = data.classes
    os.makedirs(out, exist_ok=True)
    definition = os.path.join(out, "net.prototxt")
    write_definition(read, definition)
    settings = {**settings, "data_sha256": sha256(path), "net_sha256": sha256(definition)}
    parts = {name: settings[name] for name in ("data_sha256", "validation_images", "pad")}
    done = os.path.join(out, "data", "data.json")
    if not os.path.exists(done) or results.read_json(done) != parts:
        study_data.lay_out(data, settings["validation_images"], settings["pad"],
                           os.path.join(out, "data"))
        results.write_json(done, parts)
    return Study(settings, rows, definition, out)


# ---------------------------------------------------------------------------------------------
# Trials
# ---------------------------------------------------------------------------------------------

def run_all(study: Study, jobs: int) -> List[Dict[str, Any]]:
    """Return the results of all trials: all rates with the first seed, the best of them with all.
    """
    seeds, rates = study.settings["seeds"], study.settings["learning_rates"]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        _starts(study, seeds, pool)
        trials = _trials(study, pool, [(row, rate, seeds[0]) for row in study.rows
                                       for rate in rates])
        chosen = {row.name: study_report.best_rates(row.name, trials)[:FINALISTS]
                  for row in study.rows}
        trials += _trials(study, pool, [(row, rate, seed) for seed in seeds[1:]
                                        for row in study.rows for rate in chosen[row.name]])
    for row in study.rows:
        for rate in study_report.best_rates(row.name, trials)[:1]:
            at_end = len(rates) > 1 and rate in (min(rates), max(rates))
            log.info("%s: learning rate %g%s", row.name, rate,
                     ", the last one tried: others may be better" if at_end else "")
    return trials


def _starts(study: Study, seeds: Sequence[int], pool: Any) -> None:
    jobs = [pool.submit(start, study, row, seed) for seed in seeds for row in study.rows]
    _wait(jobs, "initialisation")


def _trials(study: Study, pool: Any, asked: Sequence[Any]) -> List[Dict[str, Any]]:
    jobs = [pool.submit(_one, study, row, rate, seed) for row, rate, seed in asked]
    return _wait(jobs, "training")


def _wait(jobs: Sequence[Any], what: str) -> List[Any]:
    """Return the results of jobs; the first error ends those that have not begun."""
    found = []
    try:
        for number, job in enumerate(jobs, 1):
            found.append(job.result())
            log.info("%s %d of %d", what, number, len(jobs))
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return found


def start(study: Study, row: Initialisation, seed: int) -> str:
    """Write the weights that a row starts from with a seed, where they are not there yet.

    Returns the caffemodel; a definition beside it is for these weights.  Raises ValueError with
    what initialise.py says where it fails.
    """
    folder = os.path.join(study.out, "start", row.name)
    weights = os.path.join(folder, "seed%d.caffemodel" % seed)
    record = {"method": row.method, "scaling": row.scaling, **{
        name: study.settings[name] for name in (
            "data_sha256", "net_sha256", "validation_images", "initialisation_images")}}
    done = os.path.join(folder, "seed%d.json" % seed)
    if os.path.exists(weights) and os.path.exists(done) and results.read_json(done) == record:
        return weights
    os.makedirs(folder, exist_ok=True)
    beside = definition_beside(weights)
    if os.path.exists(beside):
        os.unlink(beside)  # of other weights
    ended = subprocess.run(
        [sys.executable, os.path.join(HERE, "initialise.py"), study.definition, weights,
         "--method", row.method, "--scaling", row.scaling,
         "--data", os.path.join(study.out, "data", "images"),
         "--images", str(study.settings["initialisation_images"]), "--seed", str(seed), "--cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, check=False)
    if ended.returncode:
        raise ValueError("%s, seed %d: %s"
                         % (row.name, seed, (ended.stderr.splitlines() or ["killed"])[-1]))
    results.write_json(done, record)
    return weights


def definition_beside(weights: str) -> str:
    """Where magic_init.py writes the definition for weights, if it has to change it."""
    return os.path.splitext(weights)[0] + ".prototxt"


def _one(study: Study, row: Initialisation, rate: float, seed: int) -> Dict[str, Any]:
    """Run a trial in a child process, or return the result that it has already."""
    weights = start(study, row, seed)
    beside = definition_beside(weights)
    trial = Trial(
        beside if os.path.exists(beside) else study.definition, weights,
        os.path.join(study.out, "data"),
        os.path.join(study.out, "trials", row.name, "lr%g" % rate, "seed%d" % seed), rate, seed,
        study.settings, {"initialisation": row.name, "method": row.method,
                         "scaling": row.scaling})
    found = finished(trial) or processes.in_child(run_trial, trial)
    return {**found, "folder": os.path.relpath(trial.folder, study.out)}


if __name__ == "__main__":
    sys.exit(main())
