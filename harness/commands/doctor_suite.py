"""`neqbench doctor`: what a suite of one's own gets wrong, before anything is trained on it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.commands.doctor_machine import Finding
from harness.commands.flops import count
from harness.data.dataset import Batches, Dataset
from harness.data.load import load_data
from harness.errors import UserError, with_origin
from harness.flops.subject import Subject, subject
from harness.methods.building import equal
from harness.run import preflight
from harness.run.attempt import attempt
from harness.run.beginnings import check_beginnings
from harness.run.routes import check_routes
from harness.run.trials import resolved, specs
from harness.seeds import seeded
from harness.storage.provenance import Slot
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite import files
from harness.suite.config import Suite, TrialSpec
from harness.suite.parts import build_model
from harness.tasks import Task, build_task
from harness.train import weights
from harness.train.tuning import narrow_strided

FEW = 12  # samples of each part that are looked at
TOGETHER = 600  # seconds that two workers may take
EPOCHS = 3  # of the trial that is broken off and resumed
NARROW_STRIDED = (
    "layer {}: in channels last and float32 on a CPU, oneDNN is reported to write past its memory "
    "for a 1x1 convolution with stride 2 and fewer than 16 input channels (oneDNN issue 6035); "
    "tuning leaves channels last out for this model: leave it out of the model's own code, too"
)


def examine_suite(path: str, settings: list[str]) -> Iterator[Finding]:
    """Findings about a suite, in the order in which a trial would meet them; the first wrong one
    ends them.

    `path`: of the suite, or its name; `settings`: as after `--set`. Raises UserError where there is
    no suite at `path`.
    """
    files.suite_file(path)
    patient = _Patient(path, settings)
    for examination in (
        patient.the_suite_file,
        patient.the_model,
        patient.the_data,
        patient.the_samples,
        patient.the_order,
        patient.the_task,
        patient.the_analysis,
        patient.the_methods,
        patient.the_accounting,
        patient.a_resumed_trial,
        patient.two_workers,
    ):
        if examination == patient.two_workers and not patient.has_own_methods:
            return
        if examination == patient.the_analysis and not patient.is_analysed:
            continue
        what = examination.__name__.strip("_").replace("_", " ")
        wrong = _complaint(examination)
        yield Finding(what, wrong)
        if wrong:
            return
        while patient.notes:
            yield Finding(what, found=patient.notes.pop(0), note=True)


def _complaint(examination: Callable[[], None]) -> str:
    try:
        examination()
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:
        return with_origin(error)
    return ""


class _Patient:
    """A suite under examination; each method raises UserError where it finds something wrong, and
    adds to `notes` what is none.
    """

    suite: Suite
    folder: Path
    model: nn.Module
    subject: Subject
    data: Dataset
    task: Task
    samples: preflight.FirstSamples

    def __init__(self, path: str, settings: list[str]) -> None:
        self._path, self._settings = path, settings
        self.notes: list[str] = []  # of the examination, on what is no error

    def the_suite_file(self) -> None:
        loaded = files.load_suite(self._path, self._settings)
        self.suite, self.folder = resolved(*loaded, synthetic=False)
        methods = self.suite.methods.values()
        baseline = any(method.is_baseline for method in methods)
        if not baseline or not any(method.in_question for method in methods):
            raise UserError(
                "methods has no baseline, or nothing to compare with it; add [methods.baseline] "
                "and [methods.neq]"
            )

    @property
    def has_own_methods(self) -> bool:
        """Whether a method comes from the user's own code."""
        return any(method.foreign for method in self.suite.methods.values())

    @property
    def is_analysed(self) -> bool:
        """Whether the suite wants to know more of its models than their metric."""
        return self.suite.sharpness is not None or self.suite.probe is not None

    def the_model(self) -> None:
        first, again = (self._built() for _ in range(2))
        others = again.state_dict().values()
        for (name, a), b in zip(first.state_dict().items(), others, strict=True):
            if not torch.equal(a, b):
                raise UserError(
                    f"two models built from one seed differ in {name}; draw from torch's, numpy's "
                    "or Python's global streams, which are seeded"
                )
        alike = check_beginnings(self.suite.model, self._build)
        self.notes += [alike] if alike else []
        weights.load_weights(first, self.suite.model)
        self.model = first
        self.subject = subject(self._path, self._settings, None, None)
        narrow = narrow_strided(first)
        if narrow and self.suite.recipe.precision == "float32":
            self.notes.append(NARROW_STRIDED.format(", ".join(narrow)))

    def _build(self) -> nn.Module:
        parts = self.suite.model
        return build_model(parts.build, self.folder, parts.arguments)

    def _built(self) -> nn.Module:
        with seeded(0, "initialisation"):
            return self._build()

    def the_data(self) -> None:
        self.data = load_data(self.suite, self.folder)
        again = load_data(self.suite, self.folder)
        if self.data.fingerprint() != again.fingerprint():
            raise UserError(
                "the data differ each time they are loaded; let them follow from a fixed seed, "
                "and list files in sorted order"
            )
        preflight.check_size(self.suite, self.data)

    def the_samples(self) -> None:
        self.samples = preflight.few(self.suite, self.data)
        preflight.check_inputs(self.suite, self.samples)
        for part, loaded in self.samples.items():
            for inputs, _ in loaded:
                if inputs.dtype != torch.float32 or not bool(inputs.isfinite().all()):
                    raise UserError(f"{part} images must be finite float32, got {inputs.dtype}")

    def the_order(self) -> None:
        first, again, later = (_flat(self._opened(), epoch) for epoch in (0, 0, 1))
        if not _same(first, again):
            raise UserError(
                "two passes over the same epoch differ; random transforms must draw from torch's, "
                "numpy's or Python's global streams"
            )
        if len(first) > 1 and _same(first, later):
            raise UserError("two epochs have the same order; take it from harness.data")
        held = [list(self._opened().evaluate("validation", 5)) for _ in range(2)]
        if not _same(*([x for x, _ in loaded] for loaded in held)):
            raise UserError("two passes over the validation images differ; leave nothing to chance")

    def _opened(self) -> Batches:
        recipe = self.suite.recipe.model_copy(update={"batch_size": 4, "forward_batch": None})
        return self.data.open(torch.device("cpu"), 0, recipe, most=FEW)

    def the_task(self) -> None:
        self.task = build_task(self.suite, self.folder)
        preflight.check_outputs(self.suite, self.task, self.model, self.samples, self.data.labels())
        ((inputs, targets),) = self.samples["training"]
        loss = self.task.loss(self.model.train()(inputs), targets)
        if loss.shape != () or not bool(loss.isfinite()) or not loss.requires_grad:
            raise UserError(
                f"the loss must be one finite number with a gradient, got {loss.detach()}"
            )
        self._check_meter()

    @torch.no_grad()
    def _check_meter(self) -> None:
        """Workers' counts are added up: half and half must be the whole."""
        whole, *halves = (self.task.meter(torch.device("cpu")) for _ in range(3))
        for position, (inputs, targets) in enumerate(self._opened().evaluate("test", 1)):
            outputs = self.model.eval()(inputs)
            for meter in (whole, halves[position % 2]):
                meter.add(outputs, targets)
        value, total = whole.value(), whole.counts.clone()
        halves[0].counts += halves[1].counts
        if not torch.equal(total, halves[0].counts) or halves[0].value() != value:
            raise UserError(
                "the meter's counts of two halves do not add up to those of the whole; let counts "
                "be sums over samples, and value() follow from them alone"
            )
        if not 0 <= value <= 1:
            raise UserError(f"the metric must be a share from 0 to 1, got {value}")

    def the_analysis(self) -> None:
        preflight.check_analysis(
            self.suite, self.folder, self.task, self.model, self.data, self.samples
        )

    def the_methods(self) -> None:
        trials = specs(self._path, self._settings, ",".join(self.suite.methods), "0")
        preflight.check_methods(trials.groups()[0], self.model, self.subject.costs)

    def the_accounting(self) -> None:
        check_routes(self.model, self.suite.model.input)
        counted = count(self.subject, 0.5, 0, verify=True)
        if counted.uncounted:
            raise UserError(f"the model's FLOPs can't be counted: {', '.join(counted.uncounted)}")
        if not counted.agrees:
            raise UserError(
                f"counted and executed FLOPs differ: {counted.json()['verify']}; does the forward "
                "depend on chance or on its input?"
            )

    def a_resumed_trial(self) -> None:
        """A few steps, broken off after each epoch, against the same without a break: of the first
        of neqbench's methods that is in question, and of each of the user's own.
        """
        known = self.suite.methods.items()
        ours = [name for name, method in known if method.in_question and not method.foreign]
        own = [name for name, method in known if method.foreign]
        for name in [*ours[:1], *own]:
            self._resume(name)

    def _resume(self, method: str) -> None:
        spec = specs(self._path, self._short(), method, "0")[0]  # of a sweep, the first experiment
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            states = []
            for root, breaks in (("through", False), ("resumed", True)):
                results = str(Path(folder) / root)
                tuned = Path(folder) / "through" / self.suite.name / "tuning"
                if tuned.is_dir():
                    shutil.copytree(tuned, Path(results) / self.suite.name / "tuning")
                _run(spec, results, breaks)
                states.append(Store(results, self.suite.name).load_checkpoint(spec.key) or {})
            through, resumed = states
            if not equal(through.get("model"), resumed.get("model")):
                raise UserError(
                    f"a trial of {method} that was broken off and resumed ended with other "
                    "weights; the model, the data or the method keep a state of their own outside "
                    "of parameters, buffers and state_dict"
                )
            if not equal(through.get("method"), resumed.get("method")):
                raise UserError(
                    f"a trial of {method} that was broken off and resumed ended with another state "
                    "of the method; it keeps something outside of its state_dict"
                )

    def two_workers(self) -> None:
        """The user's own methods in two processes, whose weights and states must stay equal."""
        for name, method in self.suite.methods.items():
            if method.foreign:
                self._run_with_two(name)

    def _run_with_two(self, method: str) -> None:
        settings = [word for setting in self._short() for word in ("--set", setting)]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            done = self._launched(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *("--nproc-per-node", "2", "-m", "harness", "run", self._path),
                    *("--methods", method, "--seeds", "0", "--results", folder, *settings),
                ],
            )
            if not done.returncode:
                return
            rows = Store(folder, self.suite.name).read("trials").to_pylist()
            said = [e for e in done.stderr.splitlines() if re.match(r"(error|\w+Error): ", e)]
            reason = rows[0]["reason"] if rows and rows[0]["reason"] else "".join(said[:1])
        raise UserError(f"method {method} fails on two workers: {reason or done.stderr[-300:]}")

    def _launched(self, command: list[str]) -> "subprocess.CompletedProcess[str]":
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that workers end with who has started them
        ) as process:
            try:
                out, error = process.communicate(timeout=TOGETHER)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, error = "", f"error: it took {TOGETHER} s; does one worker wait for another?"
        return subprocess.CompletedProcess(command, process.returncode, out, error)

    def _short(self) -> list[str]:
        validation = min(self.suite.data.validation_size, 4)
        return [
            *self._settings,
            f"recipe.epochs={EPOCHS}",
            "recipe.batch_size=4",
            f"data.train_size={validation + 8}",
            f"data.validation_size={validation}",
            *(["sharpness.samples=8"] if self.suite.sharpness else []),
            "resources={cpus=1, gpus=0}",
        ]


def _run(spec: TrialSpec, root: str, breaks: bool) -> None:
    done = 0
    while done < EPOCHS:
        events = attempt(spec, root, Slot(gpu=False, sharing=1))
        for event in events:
            if isinstance(event, Failure):
                raise UserError(event.reason)
            if isinstance(event, EpochRecord) and event.epoch >= done:
                done = event.epoch + 1
                if breaks:
                    events.close()
                    break


def _flat(batches: Batches, epoch: int) -> list[Tensor]:
    return [sample for microbatch in batches.train(epoch) for sample in microbatch.inputs]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
