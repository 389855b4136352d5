"""Sharpness, generalisation gap and linear probe of a trial, against what a checkpoint tells."""

import math
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_pruning_methods import trial
from test_sharpness import lanczos
from test_together import own, together  # noqa: F401 — `own` is a fixture
from trials import assert_same_results, keep_tuning, run, small, toy

from harness import load_results
from harness.data.load import load_data
from harness.errors import UserError
from harness.run.executors import Inline
from harness.run.preflight import few, preflight
from harness.run.trials import specs
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite import files
from harness.suite.config import digest
from harness.suite.parts import build_model
from harness.tasks import build_task
from harness.train.analysis import check_sharpness
from harness.train.assembly import assemble
from harness.train.probe import check_probe
from harness.train.tuning import Tuning

SHARPNESS = "sharpness={samples=30, every=2, iterations=400, tolerance=0.05}"
PROBE = "probe={load='suites.digits.data:load'}"
BOTH = (SHARPNESS, PROBE)
EVERY = {"sharpness", "sharpness_low", "sharpness_high", "train_metric", "generalisation_gap"}
WIDTH = "model.arguments={blocks=1, width=6, channels=1, classes=10}"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def analysed(method, *settings):
    """A trial on digits that prunes, or does not."""
    return (small if method == "baseline" else trial)(method, WIDTH, *settings)


def measures(root, spec):
    """Epoch → name → value, of the whole model."""
    rows = load_results(spec.suite.name, root=str(root)).measures
    rows = rows[rows["layer"].isna() & (rows["trial"] == spec.key)]
    return {e: dict(zip(r["name"], r["value"], strict=True)) for e, r in rows.groupby("epoch")}


def final(spec, root):
    """The model that is kept, in eval mode, and the state it has."""
    state = Store(root, spec.suite.name).load_checkpoint(spec.key)
    parts = spec.trained_suite.model
    model = build_model(parts.build, spec.folder, parts.arguments)
    model.load_state_dict(state["model"])
    return model.eval(), state


def shown(data, split, indices):
    """Normalised images and labels."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    return (split.read(indices) / 255 - mean) / std, split.labels[indices]


def accuracy_of_probe(model, data):
    """By hand: the classifier is taken off."""
    model.fc = torch.nn.Identity()
    tables = []
    with torch.no_grad():
        for split in (data.train, data.test):
            images, labels = shown(data, split, torch.arange(len(split)))
            tables += [model(images).numpy(), labels.numpy()]
    scaler = StandardScaler().fit(tables[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(max_iter=1000).fit(scaler.transform(tables[0]), tables[1])
    return float((fitted.predict(scaler.transform(tables[2])) == tables[3]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["baseline", "gradual"])
def test_values_are_those_of_the_model_that_is_kept(tmp_path, method):
    spec = analysed(method, *BOTH)
    events = run(spec, tmp_path)
    found = measures(tmp_path, spec)
    assert [epoch for epoch, names in found.items() if names.keys() >= EVERY] == [1, 3, 4]
    assert [epoch for epoch, names in found.items() if "probe_metric" in names] == [4]
    records = {e.epoch: e for e in events if isinstance(e, EpochRecord)}
    for epoch in (1, 3, 4):
        names = found[epoch]
        gap = names["train_metric"] - records[epoch].test_metric
        assert names["generalisation_gap"] == pytest.approx(gap, abs=1e-12)
        assert names["sharpness_low"] <= names["sharpness"] <= names["sharpness_high"]
    model, state = final(spec, tmp_path)
    data = load_data(spec.suite, spec.folder)
    images, labels = shown(data, data.train, data.indices[0][:30])
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).double().mean())
    assert found[4]["train_metric"] == pytest.approx(accuracy, abs=1e-12)
    assert found[4]["probe_metric"] == pytest.approx(accuracy_of_probe(model, data), abs=2 / 597)
    model, _ = final(spec, tmp_path)
    kept = state["method"]["masks"] if method == "gradual" else {}
    assert bool(kept) == (method == "gradual")
    value = lanczos(model, [(images, labels)], kept)
    assert found[4]["sharpness"] == pytest.approx(value, rel=0.01)
    if kept:
        assert lanczos(model, [(images, labels)]) != pytest.approx(value, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["baseline", "serene"])
def test_resumed_to_the_bit(tmp_path, method):
    spec = analysed(method, *BOTH)
    run(spec, tmp_path / "through")
    for epochs in range(1, 5):
        run(spec, tmp_path / "resumed", epochs)
    run(spec, tmp_path / "resumed")
    assert_same_results(spec, tmp_path / "through", tmp_path / "resumed")
    tables = [
        pq.read_table(tmp_path / root / spec.suite.name / "measures" / f"{spec.key}.parquet")
        for root in ("through", "resumed")
    ]
    assert tables[0].equals(tables[1])
    assert measures(tmp_path / "through", spec)[4].keys() >= {"probe_metric", *EVERY}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["baseline", "serene"])
def test_looking_changes_nothing(tmp_path, method):
    with_, without = analysed(method, *BOTH), analysed(method)
    assert with_.group != without.group
    for spec in (with_, without):
        run(spec, tmp_path)
    (_, one), (_, two) = (final(spec, tmp_path) for spec in (with_, without))
    for part in ("model", "optimizer", "method"):
        assert digest({"": repr(one[part])}) == digest({"": repr(two[part])})
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name])
    epochs = load_results(with_.suite.name, root=str(tmp_path)).epochs
    flops = epochs.groupby("trial")[["overhead_flops", "forward_flops"]].sum()
    assert len(flops.drop_duplicates()) == 1


@pytest.mark.slow
def test_frozen_layers_are_looked_at_as_a_whole(tmp_path):
    """A freezer's layers skip rows in a backward; the Hessian has them all the same."""
    spec = small("freeze_after", WIDTH, SHARPNESS)
    run(spec, tmp_path)
    model, _ = final(spec, tmp_path)
    data = load_data(spec.suite, spec.folder)
    value = lanczos(model, [shown(data, data.train, data.indices[0][:30])])
    assert measures(tmp_path, spec)[4]["sharpness"] == pytest.approx(value, rel=0.01)


def test_the_same_samples_for_all(tmp_path):
    """Of every seed and method, without augmentation, which digits have."""
    chosen = [
        small(m, SHARPNESS, seed=s) for m, s in (("baseline", 0), ("baseline", 1), ("neq", 7))
    ]
    subsets = []
    for spec in chosen:
        untimed = {"tuning": Tuning().to_json()}
        work = assemble(spec, torch.device("cpu"), None, untimed).analysis.evaluator
        subsets.append([torch.cat(t) for t in zip(*work.batches.evaluate("train", 7), strict=True)])
    data = load_data(chosen[0].suite, chosen[0].folder)
    wanted = shown(data, data.train, data.indices[0][:30])
    for images, labels in subsets:
        torch.testing.assert_close(images, wanted[0])
        assert torch.equal(labels, wanted[1])


@pytest.mark.slow
def test_two_workers_see_what_one_sees(tmp_path, own):  # noqa: F811
    settings = ["sharpness={samples=61, every=3, tolerance=0.01}", "probe={load='parts:load'}"]
    one = small("baseline", *settings, suite=str(own))
    two = small("baseline", *settings, "resources.workers=2", suite=str(own))
    keep_tuning(one, tmp_path / "one")
    list(Inline().run([one], str(tmp_path / "one")))
    together([two], tmp_path / "two")
    alone, shared = measures(tmp_path / "one", one), measures(tmp_path / "two", two)
    assert list(alone) == list(shared) == [2, 4]
    for epoch, names in alone.items():
        assert names.keys() == shared[epoch].keys()
        for name, value in names.items():
            close = {"rel": 0.03} if name.startswith("sharpness") else {"abs": 2 / 60}
            assert shared[epoch][name] == pytest.approx(value, **close)
    assert alone[4]["probe_metric"] > 0.8


def test_without_convergence_there_is_an_interval_and_no_number(tmp_path):
    spec = small("baseline", WIDTH, "sharpness={samples=60, every=5, iterations=1}")
    events = run(spec, tmp_path)
    assert not [e for e in events if isinstance(e, Failure)]
    rows = Store(tmp_path, spec.suite.name).read("measures").to_pylist()
    values = {row["name"]: row["value"] for row in rows}
    assert values["sharpness"] is None
    assert values["sharpness_low"] < values["sharpness_high"]
    assert math.isfinite(values["sharpness_high"])
    assert 0 <= values["train_metric"] <= 1


def test_keys_of_suites_without_them_are_as_before():
    plain = small("baseline")
    assert not {"sharpness", "probe"} & plain.suite.experiment().keys()
    keys = {plain.group}
    for settings in (
        [SHARPNESS],
        ["sharpness.samples=30"],
        ["sharpness.samples=31"],
        [PROBE],
        ["probe={load='suites.digits.data:load', layer='fc'}"],
        ["probe={load='suites.digits.data:load', arguments={a=1}}"],
    ):
        keys.add(small("baseline", *settings).group)
    assert len(keys) == 7
    elsewhere = small("baseline", "probe={load='suites.digits.data:load', root='/elsewhere'}")
    assert elsewhere.group == small("baseline", PROBE).group
    assert small("baseline", PROBE.replace("}", ", root='x'}")).suite.probe.root.startswith("/")


WRONG = {
    "more samples than there are": (
        ["sharpness.samples=211"],
        "sharpness.samples is 211, and there are 210 images to train on; lower it",
    ),
    "no such layer": (
        ["probe={load='suites.digits.data:load', layer='fd'}"],
        "probe.layer: 'fd' does not exist; there are: fc",
    ),
    "no Linear": (
        ["probe={load='suites.digits.data:load', layer='conv1'}"],
        "probe.layer: 'conv1' is no Linear; there are: fc",
    ),
    "no head": ([PROBE, "model.exclude=[]"], "model.exclude names 0 Linear layers, not one; name"),
    "another size": (
        ["probe={load='suites.digits.data:load_like_mnist'}"],
        r"model.input is \[1, 16, 16\], images of digits like MNIST are \[1, 28, 28\]; let ",
    ),
    "no such loader": (["probe={load='suites.digits.data:none'}"], "'suites.digits.data:none'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_found_before_the_first_trial(wrong):
    settings, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as raised:
        preflight([small("baseline", *settings)])
    assert "\n" not in str(raised.value)


def test_the_command_ends_with_one_line(tmp_path, neqbench):
    words = ["--set", "data.train_size=100", "--results", tmp_path, "--methods", "baseline"]
    done = neqbench("run", "digits", "--set", "sharpness.samples=500", *words)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()
    assert len(said) == 1
    assert "sharpness.samples is 500" in said[0]


@pytest.mark.parametrize(
    "setting",
    [
        "sharpness.samples=0",
        "sharpness.every=0",
        "sharpness.every=1.5",
        "sharpness.iterations=0",
        "sharpness.tolerance=0",
        "sharpness.tolerance=1",
        "sharpness.step=1",
        "sharpness=3",
        "probe.layer='fc'",
        "probe.load='nothing'",
        "probe={load='a:b', samples=0}",
    ],
)
def test_values_out_of_range(setting):
    with pytest.raises(UserError, match=setting.partition("=")[0].partition(".")[0]):
        specs("digits", [setting])


LOADERS = """
from dataclasses import replace

from harness.data import Samples, Split
from suites.digits import data

def _changed(options, train=lambda y: y, test=lambda y: y):
    found = data.load(options)
    parts = [Split(f(s.labels), s.read) for f, s in ((train, found.train), (test, found.test))]
    return replace(found, train=parts[0], test=parts[1])

def eight(options):
    return _changed(options, train=lambda y: y.clamp(max=7))

def one(options):
    return _changed(options, train=lambda y: y * 0, test=lambda y: y * 0)

def shares(options):
    return _changed(options, test=lambda y: y / 10)

def nothing(options):
    return [1, 2]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "loader, message",
    [
        ("eight", "classes differ: test images of digits are of class 8, 9, of which there is no"),
        ("one", "the training images of digits are of one class"),
        ("shares", "digits has no class for each image"),
        ("nothing", "'probes:nothing' returned list, not Images or Samples"),
    ],
)
def test_a_probe_of_other_classes(toys, loader, message):
    (toys / "probes.py").write_text(LOADERS)
    with pytest.raises(UserError, match=message):
        preflight([toy(toys, "baseline", f"probe={{load='probes:{loader}'}}")])


def test_code_of_a_probe_is_part_of_its_key(toys):
    (toys / "probes.py").write_text(LOADERS)
    setting = "probe={load='probes:eight'}"
    before = toy(toys, "baseline", setting).key
    (toys / "probes.py").write_text(LOADERS.replace("max=7", "max=8"))
    assert toy(toys, "baseline", setting).key != before


def test_a_task_of_pixels():
    """It has a sharpness; for a probe it lacks a layer with a vector for each sample."""
    suite, folder = files.load_suite("segmentation-digits", ["sharpness.samples=8", PROBE])
    data, task = load_data(suite, folder), build_task(suite, folder)
    model = build_model(suite.model.build, folder, suite.model.arguments)
    check_sharpness(suite, data, task, model, few(suite, data)["training"][0])
    with pytest.raises(UserError, match=r"probe.layer: model.exclude names 0 Linear.*: none$"):
        check_probe(suite, folder, model)


TASK = """
import torch
from harness.tasks import Classification

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope

class Task(Classification):
    def loss(self, outputs, targets):
        return super().loss(Once.apply(outputs), targets)
"""


def test_a_loss_without_a_second_derivative(toys):
    (toys / "once.py").write_text(TASK)
    settings = ["task=once:Task", "sharpness={samples=20}"]
    with pytest.raises(UserError, match=r"sharpness: it can't be found, .*once_differ.*leave"):
        preflight([toy(toys, "baseline", *settings)])


LEFT = """    @property
    def kept_weights(self):
        return {NAME: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights().items()}

    def measures"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n", "'fc'"])
def test_a_pruner_of_ones_own_may_say_what_is_left(toys, name):
    path = toys / "pruner.py"
    path.write_text(path.read_text().replace("    def measures", LEFT.replace("NAME", name)))
    spec = toy(toys, "pruner", "sharpness={samples=20}")
    if name == "n":
        preflight([spec])
        return
    with pytest.raises(UserError, match=r"kept\['fc'\] must be bool \[10, 32\]"):
        preflight([spec])


@pytest.mark.slow
def test_synthetic_suites_can_be_tried():
    (spec,) = specs("digits", [*BOTH, "recipe.epochs=1"], "baseline", "0", synthetic=True)
    preflight([spec])


@pytest.mark.parametrize("name", ["mnist-lenet5-transfer", "digits-pruning-sharpness"])
def test_the_shipped_suites(name):
    suite, _ = files.load_suite(name)
    assert suite.sharpness is not None
    assert {"baseline", "one-shot", "gradual"} < set(suite.default_methods)
    assert {"random-pruning", "lottery", "decay", "smaller"} < set(suite.default_methods)
    assert (suite.probe is not None) == (name == "mnist-lenet5-transfer")
    sparsities = {suite.methods[m].sparsity for m in ("one-shot", "gradual", "random-pruning")}
    assert len(sparsities) == 1


@pytest.mark.slow
def test_the_transfer_suite_on_noise():
    """All its methods, the narrower model among them, have the layer that is probed."""
    settings = ["data.validation_size=10", "recipe.epochs=2"]
    trials = specs("mnist-lenet5-transfer", settings, None, "0", synthetic=True)
    assert len(trials) == 7
    preflight(trials)


def test_data_of_a_probe_are_part_of_the_key(toys):
    (toys / "probes.py").write_text(LOADERS)
    settings = ("data.validation_size=30",)
    keys = {toy(toys, "baseline", *settings).key}
    for loader in ("one", "shares"):  # of one code, and other labels
        probe = f"probe={{load='probes:{loader}'}}"
        spec = toy(toys, "baseline", probe)
        assert spec.probe_fingerprint not in ("", spec.fingerprint)
        keys.add(spec.key)
    assert len(keys) == 3


@pytest.mark.parametrize(
    "setting, known", [("sharpness.sample=1", "samples, every"), ("probe.lod='a:b'", "load, arg")]
)
def test_unknown_keys_are_told_with_those_that_are_known(setting, known):
    with pytest.raises(UserError, match=f"unknown key .did you mean .*known: {known}"):
        specs("digits", [setting])
