"""Links and folders that can't be looked at, and what is said of them."""

import os
import tempfile
from pathlib import Path

import pytest

from harness import paths
from harness.commands import doctor_machine
from harness.errors import UserError
from harness.run import ray_folder
from harness.storage.locations import StorageError, open_location
from harness.suite import files


@pytest.fixture
def shut(tmp_path, monkeypatch):
    """A folder into which nobody can look, though for root there is none such."""
    closed = tmp_path / "shut"
    closed.mkdir()

    def guarded(call):
        def guard(path, *more, **given):
            if str(path).startswith(f"{closed}/"):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *more, **given)

        return guard

    for name in ("stat", "lstat", "readlink", "scandir", "listdir", "mkdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    monkeypatch.setattr(Path, "open", guarded(Path.open))
    monkeypatch.setattr("io.open", guarded(open))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: guarded(open)(f"{dir}/x"))
    return closed


def test_results_that_can_not_be_looked_at(shut):
    location = open_location(shut / "results", "digits")
    for call in (
        lambda: location.read("x"),
        lambda: location.write("x", b""),
        lambda: location.create("x", b""),
        lambda: location.names(""),
    ):
        with pytest.raises(StorageError, match=r"digits.* can't be .*: Permission denied; mend"):
            call()


def test_a_name_that_is_too_long(tmp_path):
    long = "x" * 300
    with pytest.raises(StorageError, match="can't be read: File name too long; mend that"):
        open_location(tmp_path, long).read("x")
    assert paths.lost_link(tmp_path / long) == ""
    with pytest.raises(UserError, match="unknown suite 'xxx"):
        files.suite_file(long)


def test_what_can_not_be_looked_at_is_not_said_to_be_gone(shut, tmp_path, monkeypatch):
    (tmp_path / "inside.png").symlink_to(shut / "x.png")
    real = os.stat

    def stat(path, *more, **given):
        if os.fspath(path) == str(tmp_path / "inside.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **given)

    monkeypatch.setattr(os, "stat", stat)
    assert paths.lost_link(shut / "x" / "y") == ""
    assert paths.lost_link(tmp_path / "inside.png") == ""
    with pytest.raises(UserError, match="x: Permission denied"):
        paths.files_below(shut / "x", [".png"])
    with pytest.raises(UserError, match=r"inside\.png: Permission denied"):
        paths.files_below(tmp_path, [".png"])


def test_a_suite_that_can_not_be_looked_at(shut):
    with pytest.raises(UserError, match="unknown suite"):
        files.suite_file(str(shut / "mine"))


def test_a_suite_that_is_a_link_to_nothing(tmp_path):
    (tmp_path / "suite.toml").symlink_to("/no/such/disk")
    lost = r"suite\.toml is a link to /no/such/disk, which is not there"
    for name in (tmp_path, tmp_path / "suite.toml"):
        with pytest.raises(UserError, match=lost):
            files.suite_file(str(name))
    (tmp_path / "mine.toml").write_text('extends = "suite.toml"\n')
    with pytest.raises(UserError, match=rf"mine\.toml: extends: .*{lost}"):
        files.load_suite(str(tmp_path / "mine.toml"))
    for base in ('"other.toml"', "3"):
        (tmp_path / "mine.toml").write_text(f"extends = {base}\n")
        with pytest.raises(UserError, match=r"mine\.toml: extends: no file .* beside it"):
            files.load_suite(str(tmp_path / "mine.toml"))


def spots(results):
    found = doctor_machine._space(str(results))
    return {finding.what: finding.found for finding in found}


def test_ray_s_folder_that_can_not_be_looked_at(shut, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(shut / "x"))
    monkeypatch.setattr(ray_folder, "LONGEST", 500)
    with pytest.raises(
        UserError, match=r"Ray can't write in .*: Permission denied; set RAY_TMPDIR"
    ):
        ray_folder.check_ray_folder()
    found = spots(shut / "results")
    assert list(found) == ["space for results"]
    assert found["space for results"].endswith(f" at {shut}")


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
@pytest.mark.parametrize("value", ["tmp", "./tmp", "", "~/tmp"])
def test_a_relative_folder_of_ray_s(name, value, tmp_path, monkeypatch):
    for known in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(known, raising=False)
    assert list(spots(tmp_path)) == ["space for results", "space for Ray"]
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="set RAY_TMPDIR to an absolute path"):
        ray_folder.check_ray_folder()
    assert list(spots(tmp_path)) == ["space for results"]
    assert not list(Path.cwd().glob("tmp"))
