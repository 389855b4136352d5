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
from harness.storage.checkpoint import pack_table, table_in, unpack_table
from harness.storage.locations import StorageError
from harness.storage.owner import Owner
from harness.storage.schema import COLUMNS, IDENTITY, SCHEMAS, EpochRecord, identified
from harness.storage.store import Store


def test_records_and_schema_have_the_same_columns():
    assert list(EpochRecord.__dataclass_fields__) == SCHEMAS["epochs"].names[5:]


FLOPS = "forward_flops backward_flops_dense backward_flops_paper backward_flops_required "
FLOPS += "backward_flops_executed"
NAMES = {
    "trials": "state reason traceback epochs epochs_done metric title experiment parameters data "
    "data_fingerprint attempts trials_on_device threads device cpu gpu driver git_sha git_dirty "
    "versions measures started updated",
    "epochs": "epoch samples lr train_loss val_loss test_loss test_metric frozen_neurons "
    f"total_neurons {FLOPS} overhead_flops seconds_train seconds_equilibrium seconds_test "
    "seconds_checkpoint peak_memory_bytes energy_joules effective_parameters other_load code "
    "fixed_neurons",
    "measures": "epoch layer name value",
    "layers": f"epoch layer neurons frozen {FLOPS} phi_quantiles delta_phi_quantiles "
    "velocity_quantiles mask",
    "replays": "device seconds seconds_plain ratio ratio_low ratio_high plans plans_measured "
    "activation_bytes activation_bytes_plain optimizer_bytes optimizer_bytes_plain "
    "trials_on_device other_load code updated",
}
WHOLE = f"seed epoch epochs epochs_done attempts trials_on_device threads samples {FLOPS} "
WHOLE += "effective_parameters measures frozen_neurons total_neurons overhead_flops "
WHOLE += "peak_memory_bytes fixed_neurons neurons frozen plans plans_measured"


@pytest.mark.parametrize("kind", NAMES)
def test_the_columns_are_those_of_the_files_that_are_out_there(kind):
    """Written by hand: names, their order and their types are a contract."""
    schema = SCHEMAS[kind]
    assert schema.names == [*["trial", "group", "suite", "method", "seed"], *NAMES[kind].split()]
    real = {n for n in schema.names if "loss" in n or "metric" in n}
    real |= {"lr", "energy_joules", "other_load", "value"}
    real |= {name for name in schema.names if name.startswith(("seconds", "ratio"))}
    real |= {name for name in schema.names if name.startswith(("activation_", "optimizer_"))}
    for field in schema:
        if field.name in WHOLE.split():
            assert field.type == pa.int64()
        elif field.name in real - {"metric"}:
            assert field.type == pa.float64()
        elif field.name.endswith("_quantiles"):
            assert field.type == pa.list_(pa.float64())
        elif field.name in ("started", "updated"):
            assert field.type == pa.timestamp("us", tz="UTC")
        elif field.name == "mask":
            assert field.type == pa.binary()
        else:
            assert field.type == (pa.bool_() if field.name == "git_dirty" else pa.string())


def test_tables_survive_the_way_through_a_checkpoint():
    rows = [{"epoch": 1, "layer": "conv", "frozen": None, "phi_quantiles": [0.5, 1.0]}]
    table = identified(small("baseline"), rows, "layers")
    assert unpack_table(pack_table(table)).equals(table)
    assert table.schema.equals(SCHEMAS["layers"])
    assert unpack_table(pack_table(SCHEMAS["epochs"].empty_table())).num_rows == 0


def test_columns_that_a_checkpoint_does_not_have_yet_are_null():
    rows = [{"epoch": 1, "layer": "conv", "frozen": 3}]
    table = identified(small("baseline"), rows, "layers")
    state = {"rows": {"layers": pack_table(table.drop_columns(["frozen", "layer"]))}}
    found = table_in(state["rows"], "layers")
    assert found.schema.equals(SCHEMAS["layers"], check_metadata=True)
    assert found.select(["epoch", "frozen", "layer"]).to_pylist() == [
        {"epoch": 1, "frozen": None, "layer": None}
    ]
    with pytest.raises(KeyError, match="epochs"):
        table_in(state["rows"], "epochs")


def test_the_columns_are_those_of_the_documentation():
    """results/README.md is what users rely on: its tables say what the declarations do."""
    text = (Path(__file__).parents[1] / "results" / "README.md").read_text()
    for title, columns in {"all tables": IDENTITY, **COLUMNS}.items():
        table = [f"| {title} | |", "| --- | --- |"]
        table += [f"| `{column.name}` | {column.meaning} |" for column in columns]
        assert "\n".join(table) + "\n\n" in text, title


def test_files_can_be_read_by_others(tmp_path):
    owner, mask = Owner(Store(tmp_path, "digits"), "key", 1), os.umask(0o022)
    try:
        owner.save_checkpoint(1, {})
    finally:
        os.umask(mask)
    (path,) = (tmp_path / "digits" / "checkpoints" / "key").iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_every_file_of_a_table_has_the_same_schema(tmp_path):
    for method in ("baseline", "neq"):
        run(small(method, "recipe.epochs=2"), tmp_path)
    for kind, schema in SCHEMAS.items():
        for path in (tmp_path / "digits" / kind).glob("*"):
            assert pq.read_schema(path).equals(schema)


def test_readers_skip_files_that_are_being_written(tmp_path):
    run(small("baseline", "recipe.epochs=1"), tmp_path)
    for kind in SCHEMAS:
        (tmp_path / "digits" / kind).mkdir(exist_ok=True)
        (tmp_path / "digits" / kind / ".half.parquet.x1").write_bytes(b"half")
    assert len(pd.read_parquet(tmp_path / "digits" / "epochs")) == 1
    assert Store(tmp_path, "digits").read("epochs").num_rows == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    spec = small("baseline")
    owner = Owner(Store(tmp_path, "digits"), spec.key, 1)
    owner.save_checkpoint(1, {"rows": {}, "epoch": torch.tensor(1)})

    def full(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space"):
        owner.save_checkpoint(2, {"rows": {}, "epoch": torch.tensor(2)})
    assert owner.load_checkpoint()["epoch"] == 1
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


SINCE_3 = {"effective_parameters", "other_load", "code", "measures"}
NEWER = {"5": {"fixed_neurons"}}
NEWER["3"] = {"mask"} | NEWER["5"]
NEWER["2"] = SINCE_3 | NEWER["3"]
NEWER["1"] = {"energy_joules"} | NEWER["2"]


def as_version(version, table):
    """As it was written then."""
    kept = [name for name in table.column_names if name not in NEWER[version]]
    return table.select(kept).replace_schema_metadata({"neqbench.schema": version})


@pytest.mark.parametrize("version", NEWER)
def test_tables_of_earlier_versions_are_still_read(tmp_path, version):
    run(small("baseline", "recipe.epochs=1"), tmp_path)
    store = Store(tmp_path, "digits")
    now = {kind: store.read(kind) for kind in SCHEMAS}
    for path in (tmp_path / "digits").glob("*/*.parquet"):
        pq.write_table(as_version(version, pq.read_table(path)), path)
    for kind, table in now.items():
        found = store.read(kind)
        for name in table.column_names:
            newer = name in NEWER[version]
            assert (
                found[name].null_count == len(table) if newer else found[name].equals(table[name])
            )
    some = store.read("epochs", ["trial", "energy_joules", "epoch"])
    assert some.column_names == ["trial", "energy_joules", "epoch"]
    assert some["energy_joules"].to_pylist() == [None]
    (path,) = (tmp_path / "digits" / "epochs").iterdir()
    lacking = pq.read_table(path).drop_columns("lr")
    pq.write_table(lacking, path)
    with pytest.raises(UserError, match=r"schema version \d, this neqbench reads version 6"):
        store.read("epochs")


@pytest.mark.slow
@pytest.mark.parametrize("version", NEWER)
def test_a_trial_goes_on_from_a_checkpoint_of_an_earlier_version(tmp_path, version):
    spec = small("neq", "recipe.epochs=3")
    run(spec, tmp_path / "whole")
    run(spec, tmp_path / "broken", epochs=2)
    commits = tmp_path / "broken" / "digits" / "checkpoints" / spec.key
    newest, *others = sorted(commits.iterdir(), reverse=True)
    for path in others:
        path.unlink()
    found = torch.load(newest, weights_only=True)
    rows = found["state"]["rows"]
    for kind in ("epochs", "layers", "measures"):
        rows[kind] = pack_table(as_version(version, unpack_table(rows[kind])))
    if version < "3":
        del rows["measures"], found["state"]["best"]
    found["version"] = version
    buffer = io.BytesIO()
    torch.save(found, buffer)
    epochs, lease, _, _ = newest.name.split(".")
    total = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    newest.unlink()
    (commits / f"{epochs}.{lease}.{total}.pt").write_bytes(buffer.getvalue())
    events = run(spec, tmp_path / "broken")
    assert not [event for event in events if isinstance(event, Notice)]
    assert_same_results(spec, tmp_path / "broken", tmp_path / "whole")
