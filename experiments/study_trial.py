"""One training of study.py: a net from given weights on small images, then its test.

    python experiments/study.py --data cifar10_mini.npz --out build/study
"""
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

import run_folder
import training_net
from ddinit import results
from ddinit.prototxt import (
    Input,
    build_net,
    caffe_messages,
    image_layers,
    output_blobs,
    read_definition,
)
from ddinit.trained_weights import load_weights
from image_batches import ArrayImages, Crops, prepared
from training import Measurement, Plan, train

TEST_BATCH = 100
PARTS = 4  # of a run, each at half the rate of the one before
RESULT = "result.json"
# Settings that a trial depends on, beside what tells it apart and its weights.
REPEATED = ("net_sha256", "data_sha256", "validation_images", "pad", "iterations", "batch_size",
            "momentum", "weight_decay", "clip_gradients", "measure_every")


class Trial(NamedTuple):
    """What is trained, and where.

    `definition` and `weights` are files to start from, `data` the folder of study_data.lay_out,
    `folder` the run's own; `settings` are the study's, `identity` what tells trials apart.
    """

    definition: str
    weights: str
    data: str
    folder: str
    rate: float
    seed: int
    settings: Dict[str, Any]
    identity: Dict[str, Any]


class Scores(NamedTuple):
    """Mean cross-entropy, and the part of images whose class has the highest score."""

    loss: float
    accuracy: float


def finished(trial: Trial) -> Optional[Dict[str, Any]]:
    """Return the result that a trial has already, None where it has none.

    Raises ValueError naming a setting that differs from those of the trial in its folder.
    """
    path = os.path.join(trial.folder, RESULT)
    if not os.path.exists(path):
        return None
    found = results.read_json(path)
    for name, value in repeated(trial).items():
        if found["repeat"].get(name) != value:
            raise ValueError("%s: holds a trial with %s %s, not %s: give another folder with --out"
                             % (trial.folder, name, found["repeat"].get(name), value))
    return found


def repeated(trial: Trial) -> Dict[str, Any]:
    """Return what has to be the same for a trial to come out the same."""
    return {**trial.identity, "learning_rate": trial.rate, "seed": trial.seed,
            "weights_sha256": run_folder.sha256(trial.weights),
            **{name: trial.settings[name] for name in REPEATED}}


def run_trial(trial: Trial) -> Dict[str, Any]:
    """Train and test; return what is written into the folder's result.json, too.  In a child.

    A trial that was stopped goes on from its snapshot.  A loss that is not finite is a result like
    others: `diverged` names its iteration.
    """
    found: Dict[str, Any] = {**trial.identity, "learning_rate": trial.rate, "seed": trial.seed,
                             "diverged": None, "validation_accuracy": None, "test_accuracy": None}
    try:
        outcome = train(training_plan(trial))
    except ValueError:
        found["diverged"] = _diverged(trial.folder)
        if found["diverged"] is None:
            raise
    else:
        if outcome.stopped_by is not None:
            raise KeyboardInterrupt
        found["validation_accuracy"] = outcome.measured[-1]["validation_accuracy"]
        found["test_accuracy"] = test_accuracy(trial)
    found["repeat"] = repeated(trial)
    results.write_json(os.path.join(trial.folder, RESULT), found)
    return found


def _diverged(folder: str) -> Optional[int]:
    """The iteration at which a run's loss was no longer finite, None where it was."""
    path = os.path.join(folder, "run.json")
    return results.read_json(path).get("diverged") if os.path.exists(path) else None


def test_accuracy(trial: Trial) -> float:
    """Return the accuracy of a trained net on the test images."""
    net, image = scoring_net(trial.definition)
    tested = build_net(net)
    load_weights(tested, os.path.join(trial.folder, "final.caffemodel"))
    return scores(tested, image, ArrayImages(os.path.join(trial.data, "test.npz"), "images",
                                             "labels")).accuracy


def training_plan(trial: Trial) -> Plan:
    """Return what train() is to do."""
    settings = trial.settings
    net, image = scoring_net(trial.definition)
    validation = ArrayImages(os.path.join(trial.data, "validation.npz"), "images", "labels")

    def measure(measured: Any) -> Dict[str, float]:
        found = scores(measured, image, validation)
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}

    return Plan(
        classification_net(trial, image), solver(trial), trial.folder, settings["iterations"],
        seed=trial.seed, weights=trial.weights, resume=True, settings=repeated(trial),
        measurement=Measurement(net, settings["measure_every"], measure))


def solver(trial: Trial) -> Any:
    """Return the SolverParameter: SGD, the rate halved after every quarter of the iterations."""
    settings = trial.settings
    return caffe_messages().SolverParameter(
        type="SGD", base_lr=trial.rate, lr_policy="step", gamma=0.5,
        stepsize=max(1, -(-settings["iterations"] // PARTS)), momentum=settings["momentum"],
        weight_decay=settings["weight_decay"], clip_gradients=settings["clip_gradients"])


def classification_net(trial: Trial, image: Input) -> Any:
    """Return the NetParameter that trains on random crops, mirrored half of the time."""
    layers = score_layers(read_definition(trial.definition))
    crops = Crops(image.shape[2], image.shape[3], min_scale=1.0, max_scale=1.0)
    source = training_net.image_source_layer(
        image.blob, [image.blob, "label"], "image_batches.ArrayImages",
        {"path": os.path.join(trial.data, "train.npz"), "images": "images", "labels": "labels"},
        crops, trial.settings["batch_size"], trial.seed, workers=0)
    loss = caffe_messages().LayerParameter(
        name="loss", type="SoftmaxWithLoss", bottom=[layers[-1].top[0], "label"], top=["loss"])
    return caffe_messages().NetParameter(layer=[source, *layers, loss])


def scoring_net(definition: str) -> Tuple[Any, Input]:
    """Return the NetParameter that computes class scores of TEST_BATCH images, and its input."""
    read = read_definition(definition)
    _, image = image_layers(read, TEST_BATCH)
    assert image is not None  # because we asked for a batch
    return training_net.input_net(score_layers(read), image), image


def score_layers(definition: Any) -> List[Any]:
    """Return the layers of a definition down to its last scores."""
    layers, _ = image_layers(definition, 1)
    kept = training_net.needed_for(layers, output_blobs(layers)[-1])
    return [training_net.plain(layer) for layer in kept]


def scores(net: Any, image: Input, images: ArrayImages) -> Scores:
    """Return how well a net of `scoring_net` tells the classes of images."""
    crops = Crops(image.shape[2], image.shape[3])
    losses, right = [], []
    for first in range(0, len(images.labels), TEST_BATCH):
        labels = images.labels[first:first + TEST_BATCH].astype(int)
        for place in range(len(labels)):
            net.blobs[image.blob].data[place] = prepared(images.read(first + place), crops)
        found = next(iter(net.forward().values()))[:len(labels)].reshape(len(labels), -1)
        logits = found.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        of_label = logits[np.arange(len(labels)), labels]
        losses.append(np.log(np.exp(logits).sum(axis=1)) - of_label)
        right.append(logits.argmax(axis=1) == labels)
    return Scores(float(np.concatenate(losses).mean()), float(np.concatenate(right).mean()))


def training_losses(folder: str, every: int) -> List[Dict[str, float]]:
    """Return the training loss of a run, as means over `every` iterations up to each row's."""
    rows = run_folder.read_table(os.path.join(folder, "log.csv"))
    return [{"iteration": rows[end - 1]["iteration"],
             "training_loss": float(np.mean([row["loss"] for row in rows[end - every:end]]))}
            for end in range(every, len(rows) + 1, every)]
