import hashlib
import io
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trials import assert_same_results, run, small

from harness.errors import UserError
from harness.run.events import Notice
from harness.storage.locations import StorageError
from harness.storage.schema import SCHEMAS, EpochRecord, from_bytes, identified, to_bytes
from harness.storage.store import Owner, Store


def test_records_and_schema_have_the_same_columns():
    assert list(EpochRecord.__dataclass_fields__) == SCHEMAS["epochs"].names[5:]


def test_tables_survive_the_way_through_a_checkpoint():
    rows = [{"epoch": 1, "layer": "conv", "frozen": None, "phi_quantiles": [0.5, 1.0]}]
    table = identified(small("baseline"), rows, "layers")
    assert from_bytes(to_bytes(table)).equals(table)
    assert table.schema.equals(SCHEMAS["layers"])
    assert from_bytes(to_bytes(SCHEMAS["epochs"].empty_table())).num_rows == 0


def test_the_columns_are_those_of_the_documentation():
    """results/README.md is what users rely on."""
    text = (Path(__file__).parents[1] / "results" / "README.md").read_text()
    for kind, schema in SCHEMAS.items():
        for name in schema.names:
            documented = name.removesuffix("_quantiles")
            known = f"`{documented}`" in text or documented.startswith("backward_flops")
            assert known, (kind, name)


def test_files_can_be_read_by_others(tmp_path):
    store, mask = Owner(tmp_path, "digits", 1), os.umask(0o022)
    try:
        store.save_checkpoint("key", 1, {})
    finally:
        os.umask(mask)
    (path,) = (tmp_path / "digits" / "checkpoints" / "key").iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_every_file_of_a_table_has_the_same_schema(tmp_path):
    for method in ("baseline", "neq"):
        run(small(method, "recipe.epochs=2"), tmp_path)
    for kind, schema in SCHEMAS.items():
        for path in (tmp_path / "digits" / kind).iterdir():
            assert pq.read_schema(path).equals(schema)


def test_readers_skip_files_that_are_being_written(tmp_path):
    run(small("baseline", "recipe.epochs=1"), tmp_path)
    for kind in SCHEMAS:
        (tmp_path / "digits" / kind / ".half.parquet.x1").write_bytes(b"half")
    assert len(pd.read_parquet(tmp_path / "digits" / "epochs")) == 1
    assert Store(tmp_path, "digits").read("epochs").num_rows == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    store, spec = Owner(tmp_path, "digits", 1), small("baseline")
    store.save_checkpoint(spec.key, 1, {"rows": {}, "epoch": torch.tensor(1)})

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        store.save_checkpoint(spec.key, 2, {"rows": {}, "epoch": torch.tensor(2)})
    assert store.load_checkpoint(spec.key)["epoch"] == 1
    assert len(list((tmp_path / "digits" / "checkpoints" / spec.key).iterdir())) == 1


def test_damaged_and_newer_files_are_refused_in_one_line(tmp_path):
    run(small("baseline", "recipe.epochs=1"), tmp_path)
    store = Store(tmp_path, "digits")
    (path,) = (tmp_path / "digits" / "epochs").iterdir()
    table = pq.read_table(path)
    newer = table.replace_schema_metadata({"neqbench.schema": "99"})
    pq.write_table(newer, path)
    with pytest.raises(UserError, match="schema version 99"):
        store.read("epochs")
    pq.write_table(pa.table({"other": [1]}), path)
    with pytest.raises(UserError, match="schema version"):
        store.read("epochs")
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="is damaged"):
        store.read("epochs")


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        Store(tmp_path / "file", "digits").check_writable()
    Store(tmp_path / "new", "digits").check_writable()
    assert not list((tmp_path / "new" / "digits").glob(".*"))


def as_version_1(table):
    """As it was written before `energy_joules`."""
    kept = [name for name in table.column_names if name != "energy_joules"]
    return table.select(kept).replace_schema_metadata({"neqbench.schema": "1"})


def test_tables_of_version_1_are_still_read(tmp_path):
    run(small("baseline", "recipe.epochs=1"), tmp_path)
    store = Store(tmp_path, "digits")
    now = {kind: store.read(kind) for kind in SCHEMAS}
    for kind in SCHEMAS:
        (path,) = (tmp_path / "digits" / kind).iterdir()
        pq.write_table(as_version_1(pq.read_table(path)), path)
    for kind, table in now.items():
        assert store.read(kind).equals(table)
    some = store.read("epochs", ["trial", "energy_joules", "epoch"])
    assert some.column_names == ["trial", "energy_joules", "epoch"]
    assert some["energy_joules"].to_pylist() == [None]
    (path,) = (tmp_path / "digits" / "epochs").iterdir()
    lacking = pq.read_table(path).drop_columns("lr")
    pq.write_table(lacking, path)
    with pytest.raises(UserError, match="schema version 1, this neqbench reads version 2"):
        store.read("epochs")


def test_a_trial_goes_on_from_a_checkpoint_of_version_1(tmp_path):
    spec = small("neq", "recipe.epochs=3")
    run(spec, tmp_path / "whole")
    run(spec, tmp_path / "broken", epochs=2)
    commits = tmp_path / "broken" / "digits" / "checkpoints" / spec.key
    newest, *others = sorted(commits.iterdir(), reverse=True)
    for path in others:
        path.unlink()
    found = torch.load(newest, weights_only=True)
    table = as_version_1(from_bytes(found["state"]["rows"]["epochs"].numpy().tobytes()))
    packed = torch.frombuffer(bytearray(to_bytes(table)), dtype=torch.uint8)
    found["state"]["rows"]["epochs"] = packed
    found["version"] = "1"
    buffer = io.BytesIO()
    torch.save(found, buffer)
    epochs, lease, _, _ = newest.name.split(".")
    total = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    newest.unlink()
    (commits / f"{epochs}.{lease}.{total}.pt").write_bytes(buffer.getvalue())
    events = run(spec, tmp_path / "broken")
    assert not [event for event in events if isinstance(event, Notice)]
    assert_same_results(spec, tmp_path / "broken", tmp_path / "whole")
