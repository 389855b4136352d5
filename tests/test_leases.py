"""One owner per trial."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from trials import wait_for

from harness.storage import leases
from harness.storage.leases import Claim, Lease, LeaseLost, Watch
from harness.storage.locations import open_location
from harness.storage.owner import Owner
from harness.storage.store import Store
from harness.storage.tuning_cache import make_once

ME, YOU = Claim("me", None), Claim("you", None)


@pytest.fixture(params=["folder", "bucket"])
def spot(request, tmp_path):
    return open_location(
        tmp_path if request.param == "folder" else request.getfixturevalue("bucket")
    )


@pytest.fixture
def elsewhere(monkeypatch):
    """What follows is another machine's."""

    def move():
        monkeypatch.setattr(leases, "machine", lambda: "another")

    return move


def test_a_lease_is_held_until_it_is_given_back(spot):
    with Lease.acquire(spot, "trial", ME) as lease:
        assert lease.number == 1
        assert Lease.acquire(spot, "trial", YOU) is None
        assert Lease.acquire(spot, "other", YOU)
        leases.check_owned(spot, "trial", 1)
    assert leases.latest(spot, "trial").released
    assert Lease.acquire(spot, "trial", YOU).number == 2
    with pytest.raises(LeaseLost):
        leases.check_owned(spot, "trial", 1)
    assert spot.names("leases/trial") == ["000002.json"]


def test_a_run_takes_over_from_itself(spot):
    first = Lease.acquire(spot, "trial", ME)
    again = Lease.acquire(spot, "trial", ME)
    assert (first.number, again.number) == (1, 2)


def test_it_is_renewed(spot, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    with Lease.acquire(spot, "trial", ME):
        before = leases.latest(spot, "trial")
        wait_for(lambda: leases.latest(spot, "trial").count >= before.count + 3)
        now = leases.latest(spot, "trial")
        assert now.at > before.at
        assert now.memory > 10**7
        assert (now.pid, now.number) == (os.getpid(), 1)


HOLD = """
import sys, time
from harness.storage.leases import Claim, Lease
from harness.storage.locations import open_location
with Lease.acquire(open_location(sys.argv[1]), "trial", Claim("you", None)):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path, holder):
    spot = open_location(tmp_path)
    assert Lease.acquire(spot, "trial", ME) is None
    holder.kill()
    holder.wait()
    assert Lease.acquire(spot, "trial", ME).number == 2


def test_a_process_that_stands_still_loses_its_lease_in_time(tmp_path, holder, monkeypatch):
    """Also if it wakes up again; and a clock that is wrong does not matter."""
    spot, watch = open_location(tmp_path), Watch("me")
    os.kill(holder.pid, signal.SIGSTOP)
    beat = leases.latest(spot, "trial")
    monkeypatch.setattr(leases, "STALE", 0.5)
    assert not watch.free("trial", beat)  # only just seen, however old it says it is
    time.sleep(0.6)
    assert watch.free("trial", leases.latest(spot, "trial"))
    lease = Lease.acquire(spot, "trial", Claim("me", beat))
    assert lease.number == 2
    os.kill(holder.pid, signal.SIGCONT)
    with pytest.raises(LeaseLost):
        leases.check_owned(spot, "trial", 1)


def test_a_beat_of_another_machine_is_waited_for(spot, monkeypatch, elsewhere):
    """Its process numbers mean nothing here."""
    elsewhere()
    lease = Lease.acquire(spot, "trial", YOU)
    monkeypatch.undo()
    beat = leases.latest(spot, "trial")
    assert not beat.dead
    watch = Watch("me")
    monkeypatch.setattr(leases, "STALE", 0.2)
    assert not watch.free("trial", beat)
    time.sleep(0.3)
    lease._write(leases._here(lease._beat))
    assert not watch.free("trial", leases.latest(spot, "trial"))  # it lives
    assert Lease.acquire(spot, "trial", Claim("me", beat)) is None


def test_what_the_former_owner_commits_does_not_count(tmp_path):
    """It was thought dead, and wakes up between the question and the write."""
    store = Store(tmp_path, "digits")
    old, new = Owner(store, "key", 1), Owner(store, "key", 2)
    Lease.acquire(store.location, "key", ME)
    old.save_checkpoint(3, {"rows": {}, "from": "old"})
    Lease.acquire(store.location, "key", ME)
    new.save_checkpoint(3, {"rows": {}, "from": "new"})
    with pytest.raises(LeaseLost):
        old.save_checkpoint(4, {"rows": {}, "from": "old"})
    check, leases.check_owned = leases.check_owned, lambda *_: None
    with suppress(LeaseLost):
        old.save_checkpoint(3, {"rows": {}, "from": "old", "again": torch.ones(1)})
    leases.check_owned = check
    assert new.load_checkpoint() == {"rows": {}, "from": "new"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": 1}', '{"owner": 3, "count": "x"}', "null"]
)
def test_a_lease_that_makes_no_sense_is_waited_for(tmp_path, text, monkeypatch):
    spot = open_location(tmp_path)
    spot.write("leases/trial/000004.json", text.encode())
    spot.write("leases/trial/notes.txt", b"")
    monkeypatch.setattr(leases, "STALE", 0.1)
    watch, beat = Watch("me"), leases.latest(spot, "trial")
    assert not watch.free("trial", beat)
    time.sleep(0.2)
    assert watch.free("trial", beat)
    assert Lease.acquire(spot, "trial", Claim("me", beat)).number == 5


def test_leases_say_nothing_about_the_machine_but_which_it_is(tmp_path):
    with Lease.acquire(open_location(tmp_path), "trial", ME):
        (path,) = (tmp_path / "leases" / "trial").iterdir()
        text = path.read_text()
    assert os.uname().nodename not in text
    assert set(json.loads(text)) == set(leases.Beat.__dataclass_fields__)


def test_waiting_for_a_tuning_that_a_killed_process_began(tmp_path, holder):
    """The lease of the trial stands for any: whoever measures holds one."""
    store = Store(tmp_path.parent, tmp_path.name)
    holder.kill()
    holder.wait()
    assert make_once(store.location, "trial", lambda: {"a": 1}) == {"a": 1}
    assert make_once(store.location, "trial", lambda: {"a": 2}) == {"a": 1}
