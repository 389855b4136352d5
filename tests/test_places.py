"""Files in a folder and in a bucket: one behaviour."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs
import pytest

from harness.errors import UserError
from harness.storage.locations import Bucket, Folder, StorageError, open_location


@pytest.fixture(params=["folder", "bucket"])
def spot(request, tmp_path):
    root = tmp_path if request.param == "folder" else request.getfixturevalue("bucket")
    return open_location(root, "suite")


def test_whole_files_in_and_out(spot):
    assert spot.read("a/x") is None
    assert spot.names("a") == []
    spot.write("a/x", b"one")
    spot.write("a/x", b"two")
    spot.write("a/.hidden", b"")
    spot.write("a/b/y", b"")
    assert spot.read("a/x") == b"two"
    assert spot.names("a") == ["b", "x"]
    assert spot.names("") == ["a"]
    large = os.urandom(12 * 2**20)  # more than one part of an upload
    spot.write("large", large)
    assert spot.read("large") == large
    spot.remove("a/x")
    spot.remove("a/x")
    assert spot.names("a") == ["b"]
    spot.remove("a")
    assert spot.names("a") == []


def test_of_many_who_create_a_file_one_does(spot):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: spot.create("lease", bytes([i])), range(24)))
    assert made.count(True) == 1
    assert spot.read("lease") == bytes([made.index(True)])


def test_of_many_processes_one_does(tmp_path):
    code = "import sys\nfrom harness.storage.locations import open_location\n"
    code += "print(open_location(sys.argv[1]).create('x', b'y'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    made = [process.communicate()[0].strip() for process in processes]
    assert sorted(made) == 5 * [b"False"] + [b"True"]


def test_others_read_what_is_in_a_bucket(bucket):
    """pyarrow alone finds the files, without ours between."""
    open_location(bucket, "results", "digits").write("epochs/x.parquet", b"whole")
    system, path = pyarrow.fs.FileSystem.from_uri(f"{bucket}/results/digits/epochs/x.parquet")
    assert system.open_input_file(path).read() == b"whole"


def test_what_can_not_be_written_says_so(tmp_path, object_store):
    (tmp_path / "file").write_text("")
    for bad in (open_location(tmp_path / "file"), open_location("s3://no-such-bucket/results")):
        with pytest.raises(StorageError, match=r"x can't be written: .*run the same command again"):
            bad.write("x", b"")
        with pytest.raises(StorageError, match="can't be written"):
            bad.create("x", b"")
        assert bad.read("x") is None
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_nobody_answers(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    with pytest.raises(StorageError, match=r"error sending request; check bucket, network, region"):
        open_location("s3://bucket/results").read("x")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    spot = open_location(tmp_path)
    spot.write("kept", b"old")

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (spot.write, spot.create):
        with pytest.raises(StorageError, match="No space left on device"):
            write("new", b"data")
    with pytest.raises(StorageError):
        spot.write("kept", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert spot.read("kept") == b"old"


def test_files_get_the_usual_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        open_location(tmp_path).write("x", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_roots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in ("results", tmp_path / "results", f"file://{tmp_path}/results"):
        found = open_location(root, "digits")
        assert isinstance(found, Folder)
        assert found.uri == str(tmp_path / "results" / "digits")
    for root in ("s3://bucket/results/", "gs://bucket"):
        assert isinstance(open_location(root, "digits"), Bucket)
    assert open_location("s3://bucket/results/", "digits").uri == "s3://bucket/results/digits"


@pytest.mark.parametrize(
    "root",
    [
        "ftp://host/x",
        "s3://",
        "gs:///",
        "http://host:8265",
        "s3://b/r?endpoint_override=x",
        "s3://KEY:SECRET@bucket/x",
        "s3:/bucket/x",
        "s3://bucket/a b",
        "s3://bucket/a/../b",
        "s3://bucket//b",
        "s3://bucket/a%2Fb",
        "file://relative/x",
        "nul\0l",
    ],
)
def test_uris_that_are_none(root):
    with pytest.raises(UserError, match="results lie in a folder, below s3://bucket") as refused:
        open_location(root)
    assert "SECRET" not in str(refused.value)
