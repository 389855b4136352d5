"""Disks, folders and texts as clusters and editors make them."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness.commands import submit
from harness.errors import UserError
from harness.run import ray_cluster, ray_folder
from harness.run.trials import specs
from harness.storage.locations import StorageError, open_location
from harness.suite import files, parts
from suites.segmentation.data import Voc

LONG = "/tmp/" + "x" * 60


def busy(error):
    """os.unlink and os.rmdir, as NFS has them for files that somebody else still reads."""

    def call(path, **where):
        raise OSError(error, os.strerror(error), str(path))

    return call


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "digits").mkdir()
    return open_location(tmp_path, "digits"), tmp_path / "digits"


def test_files_that_nfs_keeps_are_left(folder, monkeypatch):
    location, path = folder
    for name in (".nfs000001", ".half.1", "whole"):
        (path / name).write_bytes(b"x")
    (path / ".ipynb_checkpoints").mkdir()
    remove = os.unlink

    def unlink(path, **where):
        if Path(path).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        remove(path, **where)

    monkeypatch.setattr(os, "unlink", unlink)
    location.sweep("")
    location.remove(".nfs000001")
    assert sorted(left.name for left in path.iterdir()) == [
        ".ipynb_checkpoints",
        ".nfs000001",
        "whole",
    ]
    location.remove("whole")
    assert location.names("") == []


def test_other_files_that_can_not_be_removed_are_said(folder, monkeypatch):
    location, path = folder
    (path / ".half.1").write_bytes(b"x")
    monkeypatch.setattr(os, "unlink", busy(errno.EBUSY))
    for remove in (lambda: location.sweep(""), lambda: location.remove(".half.1")):
        with pytest.raises(StorageError, match="can't be written: Device or resource busy"):
            remove()


def test_a_folder_in_which_nfs_keeps_files_is_left(folder, monkeypatch):
    location, path = folder
    (path / "train" / "deep").mkdir(parents=True)
    (path / "train" / "deep" / "x").write_bytes(b"x")
    monkeypatch.setattr(os, "rmdir", busy(errno.ENOTEMPTY))
    location.remove("train")
    assert location.read("train/deep/x") is None


def test_results_in_a_linked_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    location = open_location(tmp_path / "results", "digits")
    location.write("trials/x", b"whole")
    assert (tmp_path / "disk" / "digits" / "trials" / "x").read_bytes() == b"whole"
    assert location.names("trials") == ["x"]
    location.remove("trials")
    assert location.names("") == []


def test_results_in_a_link_to_nothing(tmp_path, neqbench):
    (tmp_path / "results").symlink_to("/no/such/disk")
    location = open_location(tmp_path / "results", "digits")
    said = r"results is a link to /no/such/disk, which is not there; mount or mend"
    with pytest.raises(StorageError, match=said):
        location.write("x", b"")
    with pytest.raises(StorageError, match=said):
        location.create("x", b"")
    for verb in (
        ["run", "digits", "--executor", "inline"],
        ["status", "digits"],
        ["report", "digits"],
    ):
        done = neqbench(*verb, "--results", tmp_path / "results")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "is a link to /no/such/disk" in done.stderr


SUITE = """\
title = "Mine"
seeds = [0]
model = { build = "parts:model", input = [1, 16, 16] }
data = { load = "suites.digits.data:load", validation_size = 2 }
recipe = { epochs = 1, batch_size = 4, precision = "float32", optimizer = { name = "SGD" } }
methods = { baseline = {} }
"""


MODEL = """
from torch import nn


def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "suite.toml").write_text(SUITE)
    return folder


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_suites_of_any_editor(mine, mark, end):
    plain, _ = files.load_suite(str(mine))
    (mine / "suite.toml").write_bytes((mark + SUITE.replace("\n", end)).encode())
    (mine / "more.toml").write_bytes(f'{mark}extends = "suite.toml"{end}seeds = [7]'.encode())
    assert files.load_suite(str(mine))[0] == plain
    assert files.load_suite(str(mine / "more.toml"))[0].seeds == (7,)


@pytest.mark.parametrize(
    "encoding, wrong",
    [
        ("utf-16", "it is UTF-16"),
        ("utf-16-be", "it has zero bytes"),
        ("utf-16-le", "it has zero bytes"),
        ("latin-1", "byte 9 is 0xfc, which is no UTF-8"),
    ],
)
def test_suites_in_other_encodings(mine, encoding, wrong):
    text = SUITE.replace("Mine", "ü") if encoding == "latin-1" else SUITE
    (mine / "suite.toml").write_bytes(text.encode(encoding))
    (mine / "more.toml").write_text('extends = "suite.toml"')
    for name in (mine, mine / "more.toml"):
        with pytest.raises(UserError, match=f"suite.toml: cannot be read: {wrong}.*; save it"):
            files.load_suite(str(name))


def test_a_list_of_names_with_a_byte_order_mark(tmp_path):
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes("\ufeff2007_1\r\n2007_2\r\n".encode())
    with pytest.raises(UserError, match=r"JPEGImages/2007_1\.jpg: No such file"):
        Voc(tmp_path, "train")


def test_a_suite_in_a_link_to_nothing(tmp_path):
    (tmp_path / "mine").symlink_to("/no/such/disk")
    with pytest.raises(UserError, match="mine is a link to /no/such/disk, which is not there"):
        files.load_suite(str(tmp_path / "mine"))


def test_hidden_files_beside_a_suite_are_no_code_of_its(mine):
    """What macOS and Emacs leave there: no text, and a link to nothing."""
    (mine / "parts.py").write_text(MODEL)
    before = specs(str(mine))[0].key
    (mine / "._parts.py").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X\xff")
    (mine / ".#parts.py").symlink_to("somebody@host.1234")
    assert specs(str(mine))[0].key == before


def test_linked_code_is_the_suite_s(mine, tmp_path):
    """It is found, it is part of the trials' keys, and sent it makes the same trials."""
    disk = tmp_path / "disk"
    (disk / "nets").mkdir(parents=True)
    (disk / "nets" / "body.py").write_text(MODEL)
    (mine / "nets").symlink_to(disk / "nets")
    (disk / "old.py").write_text("from nets.body import model")
    (mine / "parts.py").symlink_to(disk / "old.py")
    assert parts.build_model("parts:model", mine, {})[1].out_features == 10
    assert parts.build_model("nets.body:model", mine, {})[1].out_features == 10
    before = specs(str(mine))[0].key
    assert specs(str(staged(mine, tmp_path)))[0].key == before
    (disk / "nets" / "body.py").write_text(MODEL.replace("10", "11"))
    assert specs(str(mine))[0].key != before


def staged(mine, tmp_path):
    staging = Path(tempfile.mkdtemp(dir=tmp_path))
    submit._stage(staging, str(mine), mine)
    return staging / "own" / mine.name


def test_links_are_sent_as_what_they_point_to(mine, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    (disk / "nets").mkdir(parents=True)
    (disk / "nets" / "body.py").write_text("WIDTH = 4")
    (disk / "parts.py").write_text("from nets import body")
    (mine / "nets").symlink_to(disk / "nets")
    (mine / "parts.py").symlink_to(disk / "parts.py")
    (disk / "nets" / "up").symlink_to(mine)
    (mine / "data").symlink_to("/no/such/disk")
    sent = staged(mine, tmp_path)
    found = sorted(str(p.relative_to(sent)) for p in sent.rglob("*") if p.is_file())
    assert found == ["nets/body.py", "parts.py", "suite.toml"]
    assert not any(path.is_symlink() for path in sent.rglob("*"))
    for target in ("/no/such/disk", "gone.py"):
        (mine / "gone.py").symlink_to(target)
        with pytest.raises(UserError, match=rf"gone\.py is a link to {target}") as caught:
            staged(mine, tmp_path)
        assert "\n" not in str(caught.value)
        (mine / "gone.py").unlink()


def test_a_large_folder_behind_a_link_is_not_copied(mine, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    with (disk / "large.bin").open("wb") as file:
        file.truncate(submit.LARGE + 1)
    (mine / "pictures").symlink_to(disk)
    with pytest.raises(UserError, match=r"holds more than 50 MiB .*large\.bin; move"):
        staged(mine, tmp_path)
    assert not list(tmp_path.glob("*/own/mine/pictures/large.bin"))


def joined(*_, **given):
    raise AssertionError("Ray was asked")


@pytest.fixture
def alone(monkeypatch):
    """No Ray is named, and none may be started."""
    import ray

    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "init", joined)
    return monkeypatch


def connect(address=None):
    with ray_cluster.connected(address):
        pass


def test_the_folder_is_the_one_that_ray_takes(alone):
    from ray._common.utils import get_default_ray_temp_dir

    for more in ({}, {"TMPDIR": "/tmp/mine"}, {"RAY_TMPDIR": "/tmp/ours"}):
        for name, value in more.items():
            alone.setenv(name, value)
        assert str(ray_folder.ray_folder()) == get_default_ray_temp_dir()


def test_a_long_temporary_folder(alone, neqbench, tmp_path):
    for name in ("RAY_TMPDIR", "TMPDIR"):
        alone.delenv("RAY_TMPDIR", raising=False)
        alone.setenv(name, LONG)
        with pytest.raises(UserError, match=rf"{LONG}/ray: .* 107 are allowed; set RAY_TMPDIR to"):
            connect()
    found = neqbench("doctor", "--results", tmp_path / "new", columns=300)
    assert found.returncode == 1
    assert f"wrong Ray: Ray can't start in {LONG}/ray: its sockets' paths" in found.stdout
    alone.setenv("RAY_TMPDIR", "/tmp")
    with pytest.raises(UserError, match="Ray was asked"):
        connect()


def test_the_length_is_ray_s_own(alone):
    """Where its check refuses, so does ours; where it does not, neither do we."""
    from ray._private.utils import validate_socket_filepath

    for length in range(60):
        alone.setenv("RAY_TMPDIR", "/tmp/" + "é" + "x" * length)
        told = [False, False]
        session = f"session_2026-11-28_01-46-52_123456_{os.getpid()}"
        socket = f"{ray_folder.ray_folder()}/{session}/sockets/plasma_store"
        for number, check in enumerate(
            (ray_folder.check_ray_folder, lambda path=socket: validate_socket_filepath(path))
        ):
            try:
                check()
            except (UserError, OSError):
                told[number] = True
        assert told[0] == told[1], length


def test_a_named_cluster_needs_no_folder_here(alone):
    alone.setenv("TMPDIR", LONG)
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        connect("127.0.0.1:9")


@pytest.mark.parametrize("wrong", ["file", "full", "link"])
def test_a_temporary_folder_that_can_not_be_written(alone, tmp_path, wrong):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        spot = Path(short, "x")
        if wrong == "file":
            spot.write_text("")
        if wrong == "link":
            spot.symlink_to("/no/such/disk")
        if wrong == "full":
            alone.setattr(tempfile, "TemporaryFile", lambda dir: busy(errno.ENOSPC)(dir))
        alone.setenv("TMPDIR", str(spot))
        why = {"file": "Not a directory", "full": "No space left on device", "link": "is a link to"}
        with pytest.raises(UserError, match=f"Ray can't write in {spot}/ray: .*{why[wrong]}"):
            connect()


@pytest.mark.parametrize(
    "error, address, said",
    [
        (ValueError("Package size (600 MiB) exceeds"), "local", "Ray can't start on this machine"),
        (OSError(28, "No space left on device"), "local", "Ray can't start on this machine"),
        (RuntimeError("Version mismatch: Ray 2"), "x", "the Ray cluster at x can't be joined"),
        (PermissionError(13, "Permission denied"), "x", "the Ray cluster at x can't be joined"),
        (ConnectionError("nobody is there"), "x", "no Ray cluster answers at x"),
        (KeyError("of Ray's own"), "x", "the Ray cluster at x can't be joined"),
    ],
)
def test_why_there_is_no_ray(alone, error, address, said):
    import ray

    def init(**_):
        raise error

    alone.setattr(ray, "init", init)
    with pytest.raises(UserError) as caught:
        connect(address)
    assert str(caught.value).startswith(said)
    assert str(error) in str(caught.value)
    assert ("--executor inline" in str(caught.value)) == (address == "local")


UV = """
from harness.run import ray_cluster

def knock(address):  # Ray is imported by now, and not yet asked
    import ray
    from ray._private import worker
    from ray._private.runtime_env import uv_runtime_env_hook

    uv_runtime_env_hook._get_uv_run_cmdline = lambda: ["uv", "run", "neqbench", "run"]
    ray.init = lambda **_: print(worker._maybe_modify_runtime_env(None, False))

ray_cluster.knock = knock
ray_cluster._connect("local")
"""


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [False, True])
def test_below_uv_nothing_is_sent_but_where_a_user_wants_it(tmp_path, wanted):
    name = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {name: "1"} if wanted else {}
    words = [sys.executable, "-c", UV]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (str(tmp_path) in done.stdout) == wanted
    assert wanted or done.stdout.strip() == "None"
