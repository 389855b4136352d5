import json
import shutil

import pytest

from harness.errors import UserError
from harness.run.preflight import preflight
from harness.run.trials import specs, states
from harness.suite import files, parts
from harness.suite.config import Recipe, TrialSpec
from harness.suite.fields import added

SUITE = """
title = "small"
seeds = [0, 1]
default_methods = ["baseline"]
[model]
build = "model:build"
input = [3]
[data]
load = "data:load"
validation_size = 2
[recipe]
epochs = 2
batch_size = 4
precision = "float32"
optimizer = { name = "SGD", lr = 0.1, momentum = 0.9 }
[methods.baseline]
[methods.neq]
eps = 0.01
[methods.also]
kind = "neq"
recursion = "reference"
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    (path / "suite.toml").write_text(SUITE)
    return path


def test_the_built_in_suites_load():
    names = files.shipped_suites()
    assert {"digits", "cifar10", "cifar10-adam"} <= names.keys()
    for name in names:
        suite, path = files.load_suite(name)
        assert suite.name == name
        assert path.is_dir()
        assert callable(parts.load_part(suite.model.build, path))
        assert callable(parts.load_part(suite.data.load, path))


def test_cifar10_is_the_papers_recipe():
    suite, _ = files.load_suite("cifar10")
    recipe = suite.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.precision) == (250, 100, "bf16")
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    assert (recipe.optimizer.name, recipe.optimizer.arguments) == ("SGD", sgd)
    assert recipe.scheduler.arguments == {"milestones": [100, 150], "gamma": 0.1}
    neq, reference = suite.methods["neq"], suite.methods["neq-reference"]
    assert (neq.eps, neq.mu, neq.recursion, neq.similarity) == (1e-3, 0.5, "paper", "dataset")
    assert (reference.recursion, reference.similarity) == ("reference", "sample")
    adam, _ = files.load_suite("cifar10-adam")
    assert adam.recipe.optimizer.name == "Adam"
    assert adam.recipe.optimizer.arguments["lr"] == 1e-3
    assert "momentum" not in adam.recipe.optimizer.arguments
    assert adam.recipe.scheduler == recipe.scheduler
    assert adam.methods == suite.methods


def test_settings_reach_any_depth(folder):
    settings = [
        "recipe.epochs=7",
        "recipe.optimizer.lr=0.5",
        "methods.neq.mu=0.9",
        "data.root=../somewhere/else",
        "seeds=[3]",
        "methods.new={kind='random', keep=0.5}",
    ]
    suite, path = files.load_suite(str(folder), settings)
    assert path == folder
    assert suite.name == "mine"
    assert (suite.recipe.epochs, suite.seeds, suite.data.root) == (7, (3,), "../somewhere/else")
    assert suite.recipe.optimizer.arguments == {"lr": 0.5, "momentum": 0.9}
    assert (suite.methods["neq"].mu, suite.methods["new"].keep) == (0.9, 0.5)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("recipe.epoch=5", r"recipe.epoch: unknown key \(did you mean 'epochs'\?\)"),
        ("methods.neq.epss=1", r"methods.neq.epss: unknown key \(did you mean 'eps'\?\)"),
        ("colour=1", "colour: unknown key"),
        ("recipe.epochs=0", "recipe.epochs: .*greater than 0, got 0"),
        ("recipe.precision=fp8", "recipe.precision: .*'bf16'"),
        ("methods.neq.eps=-1", "methods.neq.eps: .*greater than or equal to 0, got -1"),
        ("methods.neq.eps=nan", "methods.neq.eps: "),
        ("methods.neq.mu=1.0", "methods.neq.mu: .*less than 1"),
        ("methods.neq.kind=nope", "methods.neq: unknown method kind 'nope'; known: baseline"),
        ("methods.nope={}", "methods.nope: unknown method kind 'nope'"),
        ("methods.neq=3", "methods.neq"),
        ("methods.Bad={kind='baseline'}", "methods.Bad"),
        ("seeds=[]", "seeds: must not be empty"),
        ("seeds=[1, 1]", "seeds: a seed is listed twice"),
        ("default_methods=['x']", "default_methods names 'x'"),
        ("data.validation_size=-1", "data.validation_size"),
        ("recipe.epochs=true", "recipe.epochs: .*got True"),
        ("methods.neq.eps=true", "methods.neq.eps: .*got True"),
        ("recipe.optimizer.lr=nan", "lr must be finite"),
        ("seeds=[99999999999999999999]", "seeds.0"),
        ("resources.gpus=-1", "resources.gpus: .*got -1"),
        ("model.build=nothing", "model.build"),
        ("resources.cpus=0", "resources.cpus"),
        ("recipe.epochs", "write it as path=value"),
        ("=3", "write it as path=value"),
        ("recipe.epochs.x=3", "'epochs' is a value"),
    ],
)
def test_a_wrong_value_is_said_in_one_line(folder, setting, message):
    with pytest.raises(UserError, match=message) as caught:
        files.load_suite(str(folder), [setting])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_suite(folder, tmp_path):
    with pytest.raises(UserError, match=r"unknown suite 'digitz' \(did you mean 'digits'\?\)"):
        files.load_suite("digitz")
    (folder / "suite.toml").write_text("title = ")
    with pytest.raises(UserError, match="not valid TOML"):
        files.load_suite(str(folder))
    (folder / "suite.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        files.load_suite(str(folder))
    (folder / "suite.toml").write_text('extends = "none.toml"')
    with pytest.raises(UserError, match=r"no file 'none\.toml'"):
        files.load_suite(str(folder))
    (folder / "suite.toml").write_text('extends = "suite.toml"')
    with pytest.raises(UserError, match="extends itself"):
        files.load_suite(str(folder))


def test_extending_replaces_what_is_named_anew(folder):
    (folder / "more.toml").write_text(
        """
extends = "suite.toml"
[recipe]
epochs = 9
optimizer = { name = "Adam" }
[methods.neq]
mu = 0.25
[methods.also]
kind = "random"
keep = 0.5
"""
    )
    suite, _ = files.load_suite(str(folder / "more.toml"))
    assert (suite.name, suite.recipe.epochs, suite.recipe.batch_size) == ("mine-more", 9, 4)
    assert (suite.recipe.optimizer.name, suite.recipe.optimizer.arguments) == ("Adam", {})
    assert (suite.methods["neq"].eps, suite.methods["neq"].mu) == (0.01, 0.25)
    assert suite.methods["also"].kind == "random"


def test_parts_come_from_the_suite_s_folder_first(folder):
    (folder / "model.py").write_text("def build(): return 'mine'")
    assert parts.load_part("model:build", folder)() == "mine"
    assert parts.load_part("json:dumps", folder) is json.dumps
    for reference in ("model:nothing", "no_such_module:x", "plain"):
        with pytest.raises(UserError, match=reference.partition(":")[0]):
            parts.load_part(reference, folder)
    with pytest.raises(UserError, match="returned str, not a torch module"):
        parts.build_model("model:build", folder, {})
    with pytest.raises(UserError, match="failed: TypeError"):
        parts.build_part("model:build", folder, {"width": 3})


def test_a_module_that_fails_is_said_with_its_place_each_time(folder):
    (folder / "broken.py").write_text("\nvalue = 1 / 0\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"ZeroDivisionError: .* \(broken\.py, line 2\)"):
            parts.load_part("broken:value", folder)
    (folder / "wrong.py").write_text("def build(:")
    with pytest.raises(UserError, match="SyntaxError"):
        parts.load_part("wrong:build", folder)
    (folder / "neighbour_of_broken.py").write_text("value = 7")
    (folder / "importing.py").write_text("from neighbour_of_broken import value")
    assert parts.load_part("importing:value", folder) == 7


def spec(folder, settings=(), method="neq", seed=0, fingerprint="f", code="c"):
    suite, path = files.load_suite(str(folder), settings)
    return TrialSpec(
        suite=suite,
        folder=str(path),
        method=method,
        seed=seed,
        code=code,
        fingerprint=fingerprint,
        data_name="d",
        metric="m",
    )


@pytest.mark.parametrize(
    "change, same_key, same_group",
    [
        ({"settings": ["data.root=elsewhere"]}, True, True),
        ({"settings": ["resources.cpus=2"]}, True, True),
        ({"settings": ["title=other"]}, True, True),
        ({"settings": ["seeds=[7]"]}, True, True),
        ({"settings": ["methods.other={kind='random', keep=0.1}"]}, True, True),
        ({"seed": 1}, False, True),
        ({"method": "also"}, False, True),
        ({"settings": ["methods.neq.eps=0.02"]}, False, True),
        ({"settings": ["recipe.epochs=3"]}, False, False),
        ({"settings": ["recipe.precision=bf16"]}, False, False),
        ({"settings": ["recipe.optimizer.lr=0.2"]}, False, False),
        ({"settings": ["data.validation_size=3"]}, False, False),
        ({"code": "other"}, False, False),
        ({"fingerprint": "g"}, False, False),
    ],
)
def test_what_a_key_depends_on(folder, change, same_key, same_group):
    before, after = spec(folder), spec(folder, **change)
    assert (before.key == after.key) is same_key
    assert (before.group == after.group) is same_group


def test_keys_do_not_depend_on_how_a_value_is_written(folder):
    assert spec(folder, ["methods.neq.eps=1e-2"]).key == spec(folder).key
    assert spec(folder, ["methods.neq.mu=0.5"]).key == spec(folder).key
    one, float_one = (spec(folder, [f"recipe.optimizer.lr={lr}"]).key for lr in ("1", "1.0"))
    assert one == float_one


def test_a_new_field_leaves_keys_alone_while_it_has_its_default():
    class Clipped(Recipe):
        clip: float | None = added(None)
        more: dict[str, int] = added({})

    suite, _ = files.load_suite("digits")
    before = suite.recipe.model_dump(mode="json")
    recipes = [
        Clipped.model_validate(before | new).model_dump(mode="json")
        for new in ({}, {"clip": None, "more": {}}, {"clip": 1.0}, {"more": {"a": 1}})
    ]
    assert recipes[0] == recipes[1] == before
    assert recipes[2:] == [before | {"clip": 1.0}, before | {"more": {"a": 1}}]


def test_keys_stay_what_they_are():
    """Stored results are found by these: a change here orphans them (raise NUMERICS instead)."""
    suite, folder = files.load_suite("digits")
    names = {
        "folder": str(folder),
        "fingerprint": "f",
        "code": "c",
        "data_name": "d",
        "metric": "m",
    }
    trial = TrialSpec(suite=suite, method="neq", seed=0, **names)
    assert (trial.key, trial.group) == ("12363a7bf7d9a8cc", "bcf858c01a089c5d")


def test_the_code_of_a_suite_of_one_s_own_is_part_of_the_key(tmp_path):
    keys = []
    for text in ("x = 1", "x = 2"):
        folder = tmp_path / "mine"
        shutil.copytree(files.shipped_suites()["digits"].parent, folder, dirs_exist_ok=True)
        (folder / "extra.py").write_text(text)
        keys.append(specs(str(folder), methods="neq", seeds="0")[0].key)
    assert keys[0] != keys[1]
    cifar10, elsewhere = files.load_suite("cifar10")
    (digits,) = specs("digits", methods="neq", seeds="0")
    none = parts.code_digests(cifar10, elsewhere, shipped=True)  # none of neqbench's own
    assert (digits.code, digits.method_code) == none
    assert parts.code_digests(cifar10, elsewhere, shipped=False)[0] != digits.code


def test_parts_need_not_be_plain_functions(folder):
    for text in (
        "import functools\n@functools.cache\ndef build(): ...",
        "import functools\nbuild = functools.partial(dict)",
    ):
        (folder / "model.py").write_text(text)
        (folder / "data.py").write_text("def load(options): ...")
        suite, path = files.load_suite(str(folder))
        assert parts.code_digests(suite, path, shipped=False)[0]


def test_plan_of_digits(tmp_path):
    trials = specs("digits")
    assert [(t.method, t.seed) for t in trials[:4]] == [
        ("baseline", 0),
        ("neq", 0),
        ("random", 0),
        ("baseline", 1),
    ]
    assert len({t.key for t in trials}) == len(trials) == 15
    assert len({t.group for t in trials}) == 1
    assert {p.state for p in states(trials, str(tmp_path))} == {"to do"}
    some = specs("digits", methods="freeze_after, neq,neq", seeds="7-8,3")
    assert [(t.method, t.seed) for t in some] == [
        (method, seed) for seed in (7, 8, 3) for method in ("freeze_after", "neq")
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"methods": "neq,foo"}, "unknown method 'foo'; suite digits has baseline, neq"),
        ({"methods": " , "}, "no method is named"),
        ({"seeds": ""}, "write numbers"),
        ({"seeds": "3-1"}, "at least one seed"),
        ({"seeds": "1,1"}, "each only once"),
        ({"seeds": "x"}, "write numbers"),
        ({"settings": ["data.validation_size=1200"]}, "leave none to train on"),
        ({"settings": ["data.validation_size=0"]}, "decides on validation images"),
        ({"settings": ["data.train_size=1201"]}, "more than the 1200 images"),
    ],
)
def test_wrong_choices(arguments, message):
    with pytest.raises(UserError, match=message):
        specs("digits", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, message",
    [
        ("recipe.optimizer.name=Foo", "recipe.optimizer: unknown name 'Foo'; torch has"),
        ("recipe.optimizer.lr=-1", "SGD refuses its arguments: Invalid learning rate"),
        ("recipe.optimizer.colour=1", "SGD refuses its arguments"),
        ("recipe.scheduler.name=SGD", "recipe.scheduler: unknown name 'SGD'"),
        ("recipe.scheduler.milestones=late", "must be a list of epochs"),
        ("model.exclude=['head']", "method baseline on this model: no layer is called 'head'"),
        (
            "model.input=[3, 16, 16]",
            r"model.input is \[3, 16, 16\], the training images are \[1, 16, 16\]",
        ),
        ("recipe.optimizer={name='LBFGS'}", "LBFGS"),
        ("recipe.scheduler={name='ReduceLROnPlateau', mode='max'}", "follows a loss"),
        ("task='json:dumps'", "'json:dumps' failed: TypeError"),
        ("model.arguments={width=3}", "failed: TypeError"),
    ],
)
def test_what_only_torch_can_tell_is_found_before_anything_runs(setting, message):
    with pytest.raises(UserError, match=message):  # noqa: PT012 — the earlier the better
        trials = specs("digits", [setting])
        preflight(trials)


def test_data_parts_that_fail_or_return_something_else(folder):
    for text, message in (
        ("def load(o): raise OSError('gone')", r"'data:load' failed: OSError: gone \(data.py"),
        ("def load(o): return 3", "'data:load' returned int, not Images or Samples"),
    ):
        other = folder.with_name(f"with_{len(text)}")
        shutil.copytree(folder, other)
        (other / "data.py").write_text(text)
        with pytest.raises(UserError, match=message):
            specs(str(other))
