"""List the cells of the paper's tables: their numbers, and the runs that give ours.

The Snakefile makes what is listed here, and report.py reads it. Rows and columns have the names of
the paper. Numbers are mean average precisions in %.
"""
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

# The methods and scalings of initialize.py, which tables 1 and 2 compare.
METHODS = ("gaussian", "reference", "xavier", "msra", "ours-gaussian", "ours-pca", "ours-kmeans")
SCALINGS = ("none", "within", "between", "both")
TASKS = ("classification", "detection")
SOLVERS = ("SGD", "Adam")


class Run(NamedTuple):
    """A training run, but for its learning rate and seed.

    task      one of TASKS
    net       a name in `models` of the configuration
    method    one of METHODS, or a name in `pretrained` of the configuration
    scaling   one of SCALINGS
    solver    one of SOLVERS
    """

    task: str
    net: str
    method: str
    scaling: str
    solver: str = "SGD"


class Cell(NamedTuple):
    """A number of a table: that of the paper, and the run that gives ours."""

    row: str
    column: str
    paper: float
    run: Run


class Table(NamedTuple):
    """A table; its cells need not fill `rows` x `columns`, because the paper leaves some out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Cell]

    def cell(self, row: str, column: str) -> Optional[Cell]:
        """Return the cell of a row and a column, or None."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


def _table(title: str, columns: Sequence[str], rows: Dict[str, Sequence[Optional[float]]],
           run: Any) -> Table:
    """Return a table from its rows of numbers; run(row, column) is the run of a cell."""
    cells = [Cell(row, column, paper, run(row, column))
             for row, numbers in rows.items()
             for column, paper in zip(columns, numbers) if paper is not None]
    return Table(title, columns, list(rows), cells)

SCALING_ROWS = {"no scaling": "none", "within-layer (ours)": "within",
                "between-layer (ours)": "between", "both (ours)": "both"}
SOLVER_COLUMNS = {"SGD": ("caffenet", "SGD"), "SGD + BN": ("caffenet_bn", "SGD"),
                  "Adam": ("caffenet", "Adam"), "Adam + BN": ("caffenet_bn", "Adam")}
WEIGHT_COLUMNS = {"Gaussian": "ours-gaussian", "k-means": "ours-kmeans"}


def _scaling_run(row: str, column: str) -> Run:
    solver, weights = column.split(", ")
    net, name = SOLVER_COLUMNS[solver]
    return Run("classification", net, WEIGHT_COLUMNS[weights], SCALING_ROWS[row], name)


TABLE1 = _table(
    "Classification with various initializations, scalings, solvers and batch normalization (BN)",
    ["%s, %s" % (solver, weights) for solver in SOLVER_COLUMNS for weights in WEIGHT_COLUMNS],
    {"no scaling": (50.8, 41.2, 51.6, 49.4, 50.9, 52.0, 55.7, 53.8),
     "within-layer (ours)": (47.6, 41.2, None, None, None, None, 53.2, 53.1),
     "between-layer (ours)": (52.7, 55.7, None, None, None, None, 54.5, 57.2),
     "both (ours)": (53.3, 56.6, 56.6, 60.0, 53.1, 56.9, 56.9, 59.8)},
    _scaling_run)

TASK_COLUMNS = ("Classification", "Detection")
METHOD_ROWS = {"Xavier": ("xavier", "none"), "MSRA": ("msra", "none"),
               "Random Gaussian (hand tuned)": ("reference", "none"),
               "Ours (Random Gaussian)": ("ours-gaussian", "both"),
               "Ours (PCA)": ("ours-pca", "both"), "Ours (k-means)": ("ours-kmeans", "both")}

TABLE2 = _table(
    "Initialization methods", TASK_COLUMNS,
    {"Xavier": (51.1, 40.4), "MSRA": (43.3, 37.2), "Random Gaussian (hand tuned)": (53.4, 41.3),
     "Ours (Random Gaussian)": (53.3, 43.4), "Ours (PCA)": (52.8, 43.1),
     "Ours (k-means)": (56.6, 45.6)},
    lambda row, column: Run(column.lower(), "caffenet", *METHOD_ROWS[row]))

PRETRAINED_ROWS = {"Agrawal et al. (2015)": ("agrawal", "none"),
                   "Wang & Gupta (2015)": ("wang", "none"),
                   "Doersch et al. (2015)": ("doersch", "none"),
                   "Krizhevsky et al. (2012)": ("krizhevsky", "none"),
                   "Ours (k-means)": ("ours-kmeans", "both"),
                   "Ours + Agrawal et al. (2015)": ("agrawal", "between"),
                   "Ours + Wang & Gupta (2015)": ("wang", "between"),
                   "Ours + Doersch et al. (2015)": ("doersch", "between")}
UNGROUPED = ("doersch",)  # trained without groups (section 4)


def _pretrained_run(row: str, column: str) -> Run:
    method, scaling = PRETRAINED_ROWS[row]
    net = "caffenet_ungrouped" if method in UNGROUPED else "caffenet"
    return Run(column.lower(), net, method, scaling)


TABLE3 = _table(
    "Pretrained models", TASK_COLUMNS,
    {"Agrawal et al. (2015)": (52.9, 41.8), "Wang & Gupta (2015)": (62.8, 47.4),
     "Doersch et al. (2015)": (55.3, 46.6), "Krizhevsky et al. (2012)": (78.2, 56.8),
     "Ours (k-means)": (56.6, 45.6), "Ours + Agrawal et al. (2015)": (54.2, 43.9),
     "Ours + Wang & Gupta (2015)": (63.1, 47.2), "Ours + Doersch et al. (2015)": (65.3, 51.1)},
    _pretrained_run)

ARCHITECTURE_ROWS = {"GoogLeNet": "googlenet_single", "VGG, 16 layers": "vgg16"}

ARCHITECTURES = _table(
    "Classification with other architectures (section 4.4)", list(WEIGHT_COLUMNS),
    {"GoogLeNet": (50.0, 55.0), "VGG, 16 layers": (53.8, 56.5)},
    lambda row, column: Run("classification", ARCHITECTURE_ROWS[row], WEIGHT_COLUMNS[column],
                            "both"))

TABLES: Dict[str, Table] = {"table1": TABLE1, "table2": TABLE2, "table3": TABLE3,
                            "architectures": ARCHITECTURES}


class Curve(NamedTuple):
    """A run of train_imagenet.py whose curves are drawn: its net and its method."""

    net: str
    method: str


# The presets of train_imagenet.py, which are the solvers of the paper.
PRESETS = {"figure3": "caffenet", "figure4": "googlenet"}
CURVES: Dict[str, Dict[str, Curve]] = {
    "figure3": {"reference": Curve("caffenet", "reference"),
                "gaussian": Curve("caffenet", "ours-gaussian"),
                "kmeans": Curve("caffenet", "ours-kmeans"),
                "kmeans_nolrn": Curve("caffenet_nolrn", "ours-kmeans")},
    "figure4": {"reference": Curve("googlenet", "reference"),
                "kmeans": Curve("googlenet", "ours-kmeans"),
                "kmeans_single": Curve("googlenet_single", "ours-kmeans")}}


class Places:
    """The paths of the files of runs, by a configuration (config.schema.yaml).

    `generated` are input files that the workflow itself makes, so that they are not missing.
    """

    def __init__(self, config: Dict[str, Any], generated: Sequence[str] = ()) -> None:
        self.config = config
        self.generated = generated
        self.root = config["output"]

    def start(self, net: str, method: str, scaling: str, seed: object) -> str:
        """Return the caffemodel that a run starts from; a pretrained one has no seed."""
        if method in self.config["pretrained"] and scaling == "none":
            return self.converted(method)
        return os.path.join(self.root, "start", net, method, scaling, "seed%s.caffemodel" % seed)

    def definition(self, net: str, method: str, scaling: str, seed: object) -> str:
        """Return the definition of these weights, which scaling may have changed."""
        if method in self.config["pretrained"] and scaling == "none":
            return str(self.config["models"][net])
        return os.path.splitext(self.start(net, method, scaling, seed))[0] + ".prototxt"

    def converted(self, name: str) -> str:
        """Return the caffemodel of a pretrained model, converted to our nets."""
        return os.path.join(self.root, "pretrained", name + ".caffemodel")

    def folder(self, run: Run) -> str:
        """Return the folder of the trainings of a run."""
        return os.path.join(self.root, *run)

    def result(self, run: Run, seed: object) -> str:
        """Return the test result of a net that was trained at the chosen learning rate."""
        return os.path.join(self.folder(run), "seed%s" % seed, "result.json")

    def tried(self, run: Run, rate: str) -> str:
        """Return the result of a learning rate on the images that are held back."""
        return os.path.join(self.folder(run), "choice", "lr%s" % rate, "result.json")

    def chosen(self, run: Run) -> str:
        """Return the file with the learning rate that was chosen among several."""
        return os.path.join(self.folder(run), "rate.txt")

    def rate(self, run: Run) -> Optional[str]:
        """Return the learning rate of a run, or None before it has been chosen."""
        rates = self.rates(run)
        if len(rates) == 1:
            return rates[0]
        if not os.path.exists(self.chosen(run)):
            return None
        with open(self.chosen(run), encoding="utf-8") as file:
            return file.read().strip()

    def rates(self, run: Run) -> List[str]:
        """Return the learning rates of a run as they are in paths."""
        settings = self.config[run.task]["learning_rates"]
        rates = settings.get("nets", {}).get(run.net, settings[run.solver])
        return ["%g" % rate for rate in rates]

    def seeds(self, run: Run) -> List[int]:
        """Return the seeds of a run."""
        return list(self.config[run.task]["seeds"])

    def results(self, run: Run) -> List[str]:
        """Return the results of a run; there are none where its pretrained model is missing."""
        if self.missing(run):
            return []
        return [self.result(run, seed) for seed in self.seeds(run)]

    def missing(self, run: Run) -> Optional[str]:
        """Return the pretrained caffemodel that a run lacks, or None."""
        if run.method not in self.config["pretrained"] or self.available(run.method):
            return None
        return str(self.config["pretrained"][run.method]["weights"])

    def available(self, name: str) -> bool:
        """Return whether a pretrained caffemodel is there."""
        weights = self.config["pretrained"][name]["weights"]
        return os.path.exists(weights) or weights in self.generated
