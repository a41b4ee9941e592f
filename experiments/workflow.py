"""Run a step of the Snakemake workflow by hand.

    python experiments/workflow.py sample --voc datasets/VOCdevkit/VOC2007 --split trainval \\
        --count 160 --seed 0 --out build/images
    python experiments/workflow.py sample --list train.txt --root ILSVRC2012/train \\
        --count 100 50000 --seed 0 --out build/queries.txt build/pool.txt
    python experiments/workflow.py hold-back datasets/VOCdevkit/VOC2007 build/held_back
    python experiments/workflow.py train build/run -- python experiments/classify_voc.py train \\
        NET WEIGHTS build/run --voc VOC
    python experiments/workflow.py test build/run build/run/result.json -- python \\
        experiments/classify_voc.py test NET build/run/final.caffemodel --voc VOC --out \\
        build/run/result.json
    python experiments/workflow.py choose-rate build/rate.txt 0.001=build/run/result.json
    python experiments/workflow.py tables table2 --config experiments/paper.yaml --out build/tables

`train` runs a training command as a trial: it continues where it was killed, and records in
FOLDER/outcome.json that it has diverged. `test` runs its command, or writes into the result that
the training diverged. `tables` shows whatever has been run so far.
"""
import argparse
import sys
from typing import Callable, Dict, Optional, Sequence, Tuple

from ddinit import processes, results
from tables import choice, held_back, report, sampling
from training import trials


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder of the run")


def _add_test(parser: argparse.ArgumentParser) -> None:
    _add_train(parser)
    parser.add_argument("result", metavar="RESULT", help="JSON file that COMMAND writes")


def train(arguments: argparse.Namespace) -> int:
    """Run a training command as a trial; return the exit status."""
    runner = trials.Runner()
    with runner.signals():
        return trials.train(runner, arguments.folder, arguments.words)


def test(arguments: argparse.Namespace) -> int:
    """Run a test command, or write that the training diverged; return the exit status."""
    outcome = trials.outcome(arguments.folder)
    if "diverged" in outcome:
        results.write_json(arguments.result, outcome)
        return 0
    runner = trials.Runner()
    with runner.signals():
        return runner.run(arguments.words)


STEPS: Dict[str, Tuple[str, Callable, Callable]] = {
    "sample": ("draw images at random", sampling.add_arguments, sampling.run),
    "hold-back": ("make a VOC folder to choose learning rates on", held_back.add_arguments,
                  held_back.run),
    "train": ("run a training command as a trial", _add_train, train),
    "test": ("run a test command, unless the training diverged", _add_test, test),
    "choose-rate": ("choose the best of several learning rates", choice.add_arguments,
                    choice.run),
    "tables": ("show the paper's numbers and ours", report.add_arguments, report.run),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the step that the command line names; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    options, words = (given[:given.index("--")], given[given.index("--") + 1:]) \
        if "--" in given else (given, [])
    parser = processes.Parser(prog="workflow.py", description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for name, (about, add_arguments, _) in STEPS.items():
        form = " ".join(["%(prog)s FOLDER", "RESULT"][:1 + (name == "test")]) + " -- COMMAND" \
            if name in ("train", "test") else None
        add_arguments(steps.add_parser(name, help=about, usage=form))
    arguments = parser.parse_args(options)
    if bool(words) != (arguments.step in ("train", "test")):
        parser.error("train and test, and only these, take a command after --")
    arguments.words = words
    processes.log_to_stderr()
    return processes.command_line(STEPS[arguments.step][2], arguments, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
