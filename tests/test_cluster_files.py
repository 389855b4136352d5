"""The cluster files against the schemas that those who read them publish."""

import json
import re
import shlex
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from harness.cli import app
from harness.suite import files

HERE = Path(__file__).parents[1]
CLUSTER = HERE / "cluster"
KUBERNETES = "1.31"


@pytest.fixture
def rayjob():
    return list(yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text()))


@pytest.fixture
def ray_up():
    return yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())


def test_the_ray_job_is_one(rayjob):
    claim, job = rayjob
    schema = json.loads((HERE / "tests/rayjob.schema.json").read_text())
    jsonschema.validate(job, schema)
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        metadata = {"name": "pod"} | group["template"].get("metadata", {})
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        kubernetes_validate.validate(
            pod | {"spec": group["template"]["spec"]}, KUBERNETES, strict=True
        )
        mounted = {
            m["name"] for c in group["template"]["spec"]["containers"] for m in c["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    job["spec"]["backofLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(job, schema)


def test_the_ray_cluster_is_one(ray_up):
    schema = json.loads((resources.files("ray") / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(ray_up, schema)
    ray_up["provider"].pop("type")
    with pytest.raises(jsonschema.ValidationError, match="type"):
        jsonschema.validate(ray_up, schema)


def commands(text):
    """The neqbench commands in it, as words."""
    text = re.sub(r"\\\n|\n", " ", text)
    return [shlex.split(c) for c in re.findall(r"neqbench (?:run|prepare|submit)[^&\"]*", text)]


def test_their_commands_are_commands(rayjob, ray_up):
    """Verbs, options and suites exist; settings change what there is."""
    found = commands(rayjob[1]["spec"]["entrypoint"])
    found += [c for line in ray_up["setup_commands"] for c in commands(line)]
    assert len(found) == 3
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    for _, verb, suite, *options in found:
        assert verb in names
        settings = [b for a, b in pairwise(options) if a == "--set"]
        assert set(options[::2]) <= {"--set", "--results"}
        files.load_suite(suite, settings)


def test_versions_are_those_that_are_tested(rayjob, ray_up):
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (HERE / "constraints.txt").read_text(), re.M))
    assert rayjob[1]["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]
    image = f"rayproject/ray:{pinned['ray']}-py311-gpu"
    assert ray_up["docker"]["image"] == image
    assert f"FROM {image}\n" in (CLUSTER / "Dockerfile").read_text()


def test_extras_that_are_named_exist():
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    files = [*CLUSTER.iterdir(), *HERE.glob("*.md"), *HERE.glob("harness/**/*.py")]
    named = [
        name for f in files for name in re.findall(r"(?:neqbench|\.)\[([a-z,]+)\]", f.read_text())
    ]
    assert len(named) > 3
    assert {name for names in named for name in names.split(",")} <= set(extras)


def test_what_the_image_copies_is_what_the_build_sees():
    copied = re.findall(r"^COPY \S+ (.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.M)
    seen = re.findall(r"^!(\S+)$", (HERE / ".dockerignore").read_text(), re.M)
    assert sorted(" ".join(copied).split()) == sorted(seen)
    assert all((HERE / name).exists() for name in seen)
