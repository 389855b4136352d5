"""Where results lie: a folder on disk, or a prefix of a bucket. Whole files in, whole files out.

All that the rest of this room needs of a disk or an object store is here: replace a file so that a
reader sees the old one or the new one, and create a file that must not exist yet.
"""

import hashlib
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from harness.errors import UserError, one_line
from harness.paths import lost_link

BUCKETS = ("s3", "gs")
PART = r"[\w.=+-]+"  # of a bucket's URI
RETRY = 15  # seconds for which an object store is asked again: less than a lease takes to be stale


class StorageError(UserError):
    """The location can't be read or written now. What is committed there stays."""


def checksum(data: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()[:16]


def open_location(root: str | Path, *below: str) -> "Location":
    """The location of `root`, a path or a URI (file, s3, gs), or of a folder below it.

    Nothing is created or looked at yet. Raises UserError for what can be no location.
    """
    text = str(root)
    scheme, _, rest = text.partition("://")
    if "\0" not in text and not re.match(r"[\w+.-]+:/", text):
        return Folder(Path(text).absolute().joinpath(*below))
    if scheme == "file" and rest.startswith("/"):
        return Folder(Path(rest).joinpath(*below))
    parts = rest.rstrip("/").split("/")
    if scheme not in BUCKETS or not all(re.fullmatch(PART, p) and p.strip(".") for p in parts):
        # Not said back: it may hold a key.
        raise UserError(
            "--results: results lie in a folder, below s3://bucket/… or gs://bucket/… (letters, "
            "digits and - _ . = +); endpoint, region and keys come from the environment "
            "(AWS_ENDPOINT_URL, AWS_REGION, …)"
        )
    return Bucket("/".join([f"{scheme}:/", *parts, *below]))


class Location(ABC):
    """Files by name ("epochs/x.parquet"). Those that start with a dot are their writer's alone.

    `uri`: the location's own name, as a user writes it; `readers`: how many files are worth reading
    at a time. All methods raise StorageError where the disk or the network fails.
    """

    uri: str
    readers = 1

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The bytes of the whole file; None where there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes, last: Callable[[], None] | None = None) -> None:
        """Replace the file; whoever reads it sees the old one or the new one.

        `last` is called right before it is replaced, and prevents that by raising.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file that does not exist yet: of several who try, exactly one gets True."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in `folder`, sorted; none where there is no such
        folder.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens where there is none."""

    def sweep(self, folder: str) -> None:  # noqa: B027 — for those that leave any
        """Remove what killed writers left in a folder in which nobody else writes."""

    def path(self, name: str) -> str:
        """The whole name of the file, by which a person finds it."""
        return f"{self.uri}/{name}"


class Folder(Location):
    """A folder on this machine's disk, or on a mount that others share."""

    def __init__(self, path: Path) -> None:
        self.uri = str(path)
        self._path = path

    def read(self, name: str) -> bytes | None:
        """See Location."""
        with self._failing("read", name):
            try:
                return (self._path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, data: bytes, last: Callable[[], None] | None = None) -> None:
        """Write a temporary file beside it, through to the disk, and rename it over the file."""
        path = self._path / name
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        with self._failing("written", name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # A rename within one folder is atomic; fsync first, or a power cut could leave the
                # new name on an empty file.
                _flushed(temporary, data)
                if last:
                    last()
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """See Location."""
        path = self._path / name
        with self._failing("written", name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # O_EXCL decides between several who try, on NFS, too.
                _flushed(path, data)
            except FileExistsError:
                return False
        return True

    def names(self, folder: str) -> list[str]:
        """See Location."""
        with self._failing("read", folder):
            try:
                return sorted(p.name for p in (self._path / folder).iterdir() if p.name[0] != ".")
            except (FileNotFoundError, NotADirectoryError):
                if lost_link(self._path):
                    raise
                return []

    def remove(self, name: str) -> None:
        """See Location."""
        path = self._path / name
        with self._failing("written", name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                _unlink(path)

    def sweep(self, folder: str) -> None:
        """See Location."""
        with self._failing("written", folder):
            for path in (self._path / folder).glob(".*"):
                if path.is_symlink() or not path.is_dir():  # folders are not a writer's
                    _unlink(path)

    @contextmanager
    def _failing(self, done: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = lost_link(self._path / name) or error.strerror or one_line(error)
            raise StorageError(
                f"{self.path(name)} can't be {done}: {why}; mend that "
                "and run the same command again (or choose another place with --results)"
            ) from None


def _unlink(path: Path) -> None:
    """Remove a file, but for one that NFS keeps under such a name as long as somebody reads it."""
    with suppress(OSError) if path.name.startswith(".nfs") else nullcontext():
        path.unlink(missing_ok=True)


def _flushed(path: Path, data: bytes) -> None:
    """Write a new file through to the disk; where that fails there is none."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink()
            raise


class Bucket(Location):
    """A prefix of an object store. A read is one get and a write one put, seen whole or not at all.

    Through obstore: pyarrow.fs asks for a file's size and then for that many bytes of whatever lies
    there by then, and has no put on a condition.
    """

    readers = 32

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self, name: str) -> bytes | None:
        """See Location."""
        with self._failing("read", name) as store:
            try:
                return bytes(self._obstore.get(store, name).bytes())
            except (FileNotFoundError, self._obstore.exceptions.NotFoundError):
                return None

    def write(self, name: str, data: bytes, last: Callable[[], None] | None = None) -> None:
        """See Location."""
        with self._failing("written", name) as store:
            if last:
                last()
            self._obstore.put(store, name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See Location."""
        with self._failing("written", name) as store:
            try:
                self._obstore.put(store, name, data, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def names(self, folder: str) -> list[str]:
        """See Location."""
        prefix = f"{folder}/" if folder else ""
        with self._failing("read", folder) as store:
            found = self._obstore.list_with_delimiter(store, prefix)
        paths = [*found["common_prefixes"], *(file["path"] for file in found["objects"])]
        names = (path.rstrip("/").rpartition("/")[2] for path in paths)
        return sorted(name for name in names if name and name[0] != ".")

    def remove(self, name: str) -> None:
        """See Location."""
        with self._failing("written", name) as store:
            inside = [file["path"] for file in self._obstore.list(store, f"{name}/").collect()]
            with suppress(FileNotFoundError):
                self._obstore.delete(store, [*inside, name])

    @cached_property
    def _obstore(self) -> Any:
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{self.uri}: results in a bucket need obstore; pip install 'neqbench[cloud]'"
            ) from None
        return obstore

    @cached_property
    def _store(self) -> Any:
        self._obstore  # noqa: B018 — says what is missing
        from obstore.store import from_url

        # Plain http is for an endpoint of one's own, which says so itself.
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        retries = {"max_retries": 7, "retry_timeout": timedelta(seconds=RETRY)}
        options = {"allow_http": True} if plain else {}
        return from_url(self.uri, client_options=options, retry_config=retries)

    @contextmanager
    def _failing(self, done: str, name: str) -> Iterator[Any]:
        try:
            yield self._store
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            why = one_line(error).partition(" Debug source")[0]
            raise StorageError(
                f"{self.path(name)} can't be {done}: {why}; check bucket, network, region "
                "(AWS_REGION) and keys (AWS_ACCESS_KEY_ID, …; ~/.aws is not read), then run the "
                "same command again"
            ) from None
