"""What a suite's file may say, as validated models, and what identifies a trial."""

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from harness.suite.fields import ImportString, added
from harness.suite.method_specs import MethodSpec, with_kinds

# Raise when a change to the code changes the numbers of a trial: old results then stand apart.
NUMERICS = 3
PLATEAU = "ReduceLROnPlateau"  # the scheduler that follows the validation loss, once an epoch
MARGIN = 0.5  # percentage points, where a suite states none

Count = Annotated[int, Field(gt=0, strict=True)]
Size = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
# A sweep's methods are called after their parameters, too: "neq eps=0.001".
MethodName = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*( [A-Za-z_][A-Za-z0-9_]*=[\w.+-]+)*$", max_length=120)
]


class Strict(BaseModel):
    """A part of a suite: unknown keys, infinities and later changes are refused.

    A field that is new in a part gets its default from `harness.suite.fields.added`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TorchClass(BaseModel):
    """A class of torch by its `name`, such as SGD; all other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    name: str

    @model_validator(mode="after")
    def _finite(self) -> "TorchClass":
        for key, value in self.arguments.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be finite, got {value}")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class."""
        return dict(self.model_extra or {})


class Model(Strict):
    """The model: `build(**arguments)` returns it, and `input` is the shape of one sample.

    `exclude`: layers, or dotted prefixes of their names, that are read and never freeze. `weights`:
    what training starts from: a file, "torchvision:NAME" or "timm:NAME" (default: from scratch);
    `weights_into`: the part of the model that they are for. `unpublished`: layers that the
    published count leaves out.
    """

    build: ImportString
    arguments: dict[str, Any] = {}
    input: Annotated[tuple[Count, ...], Field(min_length=1)]
    exclude: tuple[str, ...] = ()
    weights: str = ""
    weights_into: str = ""
    unpublished: tuple[str, ...] = ()


class Data(Strict):
    """The data: `load(options)` returns Images or Samples, given this table as `options`.

    `root`: where files lie; `arguments`: whatever `load` likes to be told. Sizes are counted in
    images. `train_size`: how many of the training set are used at all (default: every one);
    `validation_size`: how many of those are set aside for deciding. Both are drawn with
    `split_seed`, the same for every run. `synthetic`: noise of the right shape instead.
    `download(options)` fetches what is missing below `root`, for `neqbench prepare`.
    """

    load: ImportString
    download: ImportString | None = None
    arguments: dict[str, Any] = {}
    synthetic: bool = False
    root: str = ""
    train_size: Count | None = None
    validation_size: Size
    split_seed: Seed = 0


class Recipe(Strict):
    """How a model is trained, in every trial of the suite.

    `batch_size`: samples of one optimizer step, of all workers together; `forward_batch`: how many
    of them one worker computes at a time, and BatchNorm sees (default: all of its share; a last
    batch may take a few more, so that no forward has a single sample). The gradient is that of the
    mean of the forwards' mean losses, weighted by their samples.
    `schedule`: how often the scheduler steps; its arguments count epochs either way.
    `lr_factors`: of the parts of the model that have a learning rate of their own. `compile`: the
    model is trained as torch.compile makes it.
    """

    epochs: Count
    batch_size: Count
    forward_batch: Annotated[int, Field(ge=2, strict=True)] | None = None
    precision: Literal["float32", "bf16", "fp16"]
    optimizer: TorchClass
    lr_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    scheduler: TorchClass | None = None
    schedule: Literal["epoch", "iteration"] = "epoch"
    compile: bool = added(False)

    def forward_size(self, workers: int) -> int:
        """Samples of the largest microbatch of one of `workers` workers."""
        return forward_size(self.batch_size, self.forward_batch, workers)


class Resources(Strict):
    """What a trial may use: `cpus` for each of its `workers`, which are data-parallel processes.

    `gpus`: of the whole trial; "auto": one for each worker where the machine or cluster has any.
    Several GPUs make as many workers. `time_limit`: seconds that a trial may take in one run; one
    that takes longer has failed.
    """

    cpus: Count = 1
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    workers: Count | None = None
    time_limit: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Resources":
        gpus, workers = self.gpus, self.workers
        if gpus == "auto" or gpus == 0:
            return self
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus: a trial can have a share of one GPU or whole ones, not {gpus}")
        if (workers not in (None, 1) and gpus != workers) or (workers == 1 and gpus > 1):
            raise ValueError(f"gpus: {workers} workers need one GPU each, or none; got {gpus}")
        return self

    @property
    def world_size(self) -> int:
        """How many data-parallel processes one trial has."""
        gpus = 1 if self.gpus == "auto" else max(int(self.gpus), 1)
        return self.workers or gpus

    @property
    def gpus_each(self) -> float:
        """GPUs, or the share of one, for each worker, where there are any."""
        return 1.0 if self.gpus == "auto" else self.gpus / self.world_size


class Sharpness(Strict):
    """How sharp the minimum is, looked at every so many epochs and after the last one.

    `samples`: of the training part, the same for all methods and seeds: the Hessian is that of
    their mean loss, and `train_metric` is measured on them, too. `iterations` of power iteration at
    most, `tolerance` of its residual, relative: see neq.top_eigenvalue. `measures`: what is
    recorded.
    """

    measures: ClassVar = (
        *("sharpness", "sharpness_low", "sharpness_high"),
        *("train_metric", "generalisation_gap"),
    )
    samples: Count = 500
    every: Count = 10
    iterations: Count = 200
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.02


class Probe(Strict):
    """Other data, on which the features of the trained model are tried by logistic regression.

    `load`, `arguments`, `root`: as of Data, which must be there: `prepare` fetches none. All of its
    training images are trained on, without augmentation. `layer`: the Linear layer whose inputs are
    the features (default: the only one that model.exclude names). `measures`: what is recorded.
    """

    measures: ClassVar = ("probe_metric",)
    load: ImportString
    arguments: dict[str, Any] = {}
    root: str = ""
    layer: str = ""

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: str) -> str:
        return str(Path(root).absolute()) if root else ""  # a worker may work elsewhere


class PublishedValue(Strict):
    """One published figure, the mean of `n` runs with `std` where these are known.

    `methods`: which of the suite's it is of, with which `parameters`; `what`: the metric (a share),
    `paper`, mean backward FLOPs of a sample as the paper counts them (over some `epochs`, both ends
    included), `paper_dense`, the same with nothing frozen, or `frozen`, the share of neurons in the
    last epoch. `error`: relative, of reading it off.
    `certainty`: in the paper; of the authors' run tables; computed by the paper's rule; digitised
    from a figure; unconfirmed. `doubt`: why nothing can be held against it.
    """

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    what: Literal["metric", "paper", "paper_dense", "frozen"]
    epochs: tuple[Size, Count] | None = None
    value: float
    std: Annotated[float, Field(ge=0)] | None = None
    n: Count | None = None
    error: Annotated[float, Field(ge=0)] = 0.0
    certainty: Literal["paper", "runs", "computed", "digitised", "unconfirmed"]
    conditions: dict[str, Any] = {}
    doubt: str = ""


class Published(Strict):
    """What has been published on the suite, where, and under which conditions: values of the
    experiment by path ("recipe.epochs"; "all" where it says none, "any" where it does not matter),
    and "data", the name of the data. `remark`: what a reader has to know.
    """

    source: str = ""
    remark: str = ""
    conditions: dict[str, Any] = {}
    values: tuple[PublishedValue, ...] = ()


class Suite(Strict):
    """A workload and everything that is run on it: a suite's file, validated.

    `task(**task_arguments)` returns the harness.tasks.Task. `methods`: by the name that a user
    gives them; `default_methods`: those that are run where none are named. `margin`: the loss of
    the metric that is accepted, in percentage points. `sharpness`, `probe`: what is looked at
    whatever the method. `point`: of a sweep, what was chosen for this experiment, by path.
    """

    name: Name
    title: str
    task: ImportString = "harness.tasks:Classification"
    task_arguments: dict[str, Any] = {}
    model: Model
    data: Data
    recipe: Recipe
    resources: Resources = Resources()
    methods: dict[MethodName, MethodSpec]
    default_methods: tuple[str, ...] = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    margin: Annotated[float, Field(gt=0, lt=100)] = MARGIN
    published: Published = Published()
    sharpness: Sharpness | None = added(None)
    probe: Probe | None = added(None)
    point: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, values: Any) -> Any:
        return with_kinds(values)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice")
        return seeds

    @model_validator(mode="after")
    def _known_defaults(self) -> "Suite":
        for name in self.default_methods:
            if name not in self.methods:
                raise ValueError(f"default_methods names {name!r}, which is not under methods")
        return self

    def experiment(self) -> dict[str, Any]:
        """What all trials of a group share: everything that defines the numbers, and no paths."""
        parts = {"name", "task", "task_arguments", "model", "data", "recipe", "sharpness", "probe"}
        values = self.model_dump(mode="json", include=parts)
        del values["data"]["root"], values["data"]["download"], values["model"]["weights"]
        values.get("probe", {}).pop("root", None)
        return values | {"numerics": NUMERICS, "world_size": self.resources.world_size}


class TrialSpec(Strict):
    """One trial: a suite's experiment with one method and one seed, on data that were looked at.

    `folder`: where the suite's own modules lie; `code`: digest of those that are not neqbench's,
    without those that methods alone import: `method_code` has a digest of them by method.
    `fingerprint`: of the data, from their content; `probe_fingerprint`: of the probe's; `weights`:
    of what training starts from; `metric`: what the suite's task measures.
    """

    suite: Suite
    folder: str
    method: str
    seed: int
    code: str
    method_code: dict[str, str] = {}
    fingerprint: str
    probe_fingerprint: str = ""
    weights: str = ""
    data_name: str
    metric: str

    @cached_property
    def group(self) -> str:
        """Hash of all but method and seed: trials that share it may stand in one table."""
        seen = {"code": self.code, "data_fingerprint": self.fingerprint, "weights": self.weights}
        if self.probe_fingerprint:
            seen["probe_fingerprint"] = self.probe_fingerprint
        return digest(self.suite.experiment() | seen)

    @property
    def key(self) -> str:
        """Hash of all that defines the trial: the name under which its results are kept."""
        method = json.loads(self.parameters)
        return digest(
            {"group": self.group, "name": self.method, "method": method, "seed": self.seed}
        )

    @property
    def method_spec(self) -> MethodSpec:
        """The method's parameters."""
        return self.suite.methods[self.method]

    @property
    def parameters(self) -> str:
        """The method's parameters as they are stored, JSON; of a user's own with its code's
        digest.
        """
        text = self.method_spec.model_dump_json()
        code = self.method_code.get(self.method)
        return json.dumps(json.loads(text) | {"code": code}) if code else text

    @property
    def trained_suite(self) -> Suite:
        """The suite, with arguments of the model as the method wants them."""
        changes = self.method_spec.model_changes
        if not changes:
            return self.suite
        arguments = {"arguments": self.suite.model.arguments | changes}
        model = self.suite.model.model_copy(update=arguments)
        return self.suite.model_copy(update={"model": model})


def forward_size(batch_size: int, forward_batch: int | None, workers: int) -> int:
    """Samples of the largest microbatch of one of `workers` workers: its share of a batch, or
    `forward_batch` where that is less.
    """
    share = -(-batch_size // workers)
    return min(forward_batch or share, share)


def digest(value: dict[str, Any]) -> str:
    """Hash of plain values, the same in whatever order keys stand; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """1.0 and 1 are the same value, however they were written."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
