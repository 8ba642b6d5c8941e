"""What processes of a job tell each other, and what silence means (jobs of real processes: tests/test_jobs.py)."""

from __future__ import annotations

import json
import threading
import time

import jax
import numpy as np
import pytest

from m1jax.errors import HostLost, NonFinite, UserError
from m1jax.train import hosts
from m1jax.train.clock import Clock
from m1jax.train.hosts import HostsConfig, Watchdog, preflight, watched


@pytest.fixture
def two(monkeypatch):
    """This is process 0 of 2; the other one, "there", says of itself what is set here."""
    there: dict = {"facts": {}, "writes": True}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "from_first", lambda make: make())

    def exchange(value):
        if isinstance(value, tuple):
            name, facts = value
            return [value, ("there", facts | there["facts"])]
        if isinstance(value, str):  # after each has tried to write into the shared folder
            if there["writes"]:
                mark = next(there["folder"].glob("hosts/.*-00000"))
                mark.with_name(mark.name.replace("-00000", "-00001")).write_text("")
            return [value, there.get("problem", "")]
        return [value, value]

    monkeypatch.setattr(hosts, "exchange", exchange)
    return there


def test_hosts_that_are_alike_pass(tmp_path, two):
    two["folder"] = tmp_path
    preflight(tmp_path, {"seed": 0})
    assert [f.name for f in (tmp_path / "hosts").iterdir()] and not list((tmp_path / "hosts").glob(".*-00000"))


@pytest.mark.parametrize("fact", ["Python", "jax", "the code of m1jax", "the config", "devices of a process"])
def test_what_differs_is_named_with_both_hosts(tmp_path, two, fact):
    two["facts"] = {fact: "other"}
    with pytest.raises(UserError, match=rf"host there \(process 1\): {fact} is other, on .* \(process 0\) it is "):
        preflight(tmp_path, {"seed": 0})


def test_a_folder_that_is_not_shared_is_refused(tmp_path, two, monkeypatch):
    two |= {"folder": tmp_path, "writes": False}
    absent = hosts._absent
    monkeypatch.setattr(hosts, "_absent", lambda paths: absent(paths, 0.1))
    with pytest.raises(UserError, match=r"host there \(process 1\) writes into another folder of that name; give a"):
        preflight(tmp_path, {})
    two |= {"problem": "cannot write there (Permission denied)"}
    with pytest.raises(UserError, match=r"host there \(process 1\) cannot write there \(Permission denied\)"):
        preflight(tmp_path, {})


def test_a_folder_that_this_host_cannot_write_is_refused_in_one_line(tmp_path, two, monkeypatch):
    (tmp_path / "run").write_text("a file where the folder should be")
    two["writes"] = False
    monkeypatch.setattr(hosts, "_absent", lambda paths: [])
    with pytest.raises(UserError, match=r"\(process 0\) cannot write there \(Not a directory\); give a --workdir that"):
        preflight(tmp_path / "run", {})


def test_one_process_asks_nobody(tmp_path):
    preflight(tmp_path, {})
    assert hosts.exchange(3) == [3] and hosts.from_first(lambda: 4) == 4 and not hosts.anywhere(False)
    with watched(tmp_path, HostsConfig(), Clock()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_changes_in_the_code_changes_its_fingerprint(tmp_path, monkeypatch):
    before = hosts._code()
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / "train" / "hosts.py"))
    (tmp_path / "a.py").write_text("x = 1\n")
    one = hosts._code()
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len({before, one, hosts._code()}) == 3


class Peer:
    """A process that shows signs of life in the folder until it is stopped."""

    def __init__(self, folder, run: str, stage: str = "update", step: int = 3):
        self.folder, self.run, self.stage, self.step, self.asked = folder, run, stage, step, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)  # a test that fails does not end it
        self._thread.start()

    def _live(self):
        beat = 0
        while not self._over.wait(0.02):
            beat += 1
            sign = dict(run=self.run, host="there", beat=beat, stage=self.stage, step=self.step, asked=self.asked)
            staging = self.folder / "hosts" / "00001.peer"
            staging.write_text(json.dumps(sign))
            staging.replace(self.folder / "hosts" / "00001.json")

    def die(self):
        self._over.set()
        self._thread.join()


def wait(what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


@pytest.fixture
def clock():
    clock = Clock()
    yield clock
    clock.close()


def test_a_process_that_falls_silent_ends_the_job_with_its_name(tmp_path, two, clock, capsys, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_S", 0.1)
    left: list[int] = []
    dog = Watchdog(tmp_path, HostsConfig(lost_s=0.5), clock, left.append, beat_s=0.02)
    peer = Peer(tmp_path, dog._run)
    assert not wait(lambda: dog.found, 1.5), "it lives"
    peer.die()
    assert wait(lambda: left) == [75]
    said = capsys.readouterr().err
    assert "error: host there (process 1 of 2) gave no sign of life for " in said and "in update of step 3;" in said
    dog.close()


def test_a_stage_that_nobody_leaves_is_told_with_who_stalls(tmp_path, two, clock, capsys, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_S", 0.1)
    left: list[int] = []
    dog = Watchdog(tmp_path, HostsConfig(lost_s=60, stall_s=0.6), clock, left.append, beat_s=0.02)
    clock.step, clock.running = 3, "update"
    peer = Peer(tmp_path, dog._run, "reward", 2)
    assert wait(lambda: left) == [75]
    peer.die()
    said = capsys.readouterr().err
    assert "host there (process 1) stalls in reward of step 2: no process has left its stage for 1 s" in said
    assert "in update of step 3" in said
    dog.close()


def test_of_two_in_one_step_the_one_that_did_not_go_on_stalls(tmp_path, two, clock, capsys, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_S", 0.1)
    left: list[int] = []
    clock.step, clock.running = 3, "reward"
    dog = Watchdog(tmp_path, HostsConfig(lost_s=60, stall_s=0.8), clock, left.append, beat_s=0.02)
    peer = Peer(tmp_path, dog._run, "reward", 3)
    time.sleep(0.4)
    clock.running = "update"
    assert wait(lambda: left) == [75]
    peer.die()
    assert "host there (process 1) stalls in reward of step 3" in capsys.readouterr().err
    dog.close()


def test_while_the_folder_cannot_be_written_silence_says_nothing(tmp_path, two, clock, monkeypatch):
    left: list[int] = []
    dog = Watchdog(tmp_path, HostsConfig(lost_s=0.5), clock, left.append, beat_s=0.02)
    write = type(tmp_path).write_text

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    time.sleep(1.5)
    assert dog.found == "" and left == []
    monkeypatch.setattr(type(tmp_path), "write_text", write)
    assert wait(lambda: dog.found), "and then it does"
    dog.close()


def test_messages_are_cut_and_joined():
    """As large as they are, the pieces have few lengths, and no byte is lost."""
    for size in (0, 1, 255, 256, 257, hosts.PIECE - 1, hosts.PIECE, hosts.PIECE + 1, 2 * hosts.PIECE + 5):
        data = np.random.default_rng(size).bytes(min(size, 300)) * (size // 300 + 1)
        pieces = list(hosts._pieces(data[:size], size))
        assert b"".join(piece.tobytes() for piece in pieces)[:size] == data[:size]
        assert all(piece.size & (piece.size - 1) == 0 for piece in pieces)
        assert len(list(hosts._pieces(b"", size))) == len(pieces), "who has nothing to say takes part all the same"
    assert hosts._sizes([hosts._split(5 << 31), hosts._split(7)]) == [5 << 31, 7]


@pytest.mark.parametrize("error", [NonFinite(3, "update", "train/loss"), UserError("a: b"), HostLost("c")])
def test_errors_arrive_as_they_were_raised(error):
    arrived = hosts._portable(error)
    assert type(arrived) is type(error) and str(arrived) == str(error)


def test_signs_of_an_earlier_start_are_none(tmp_path, two, clock, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_S", 0.1)
    left: list[int] = []
    dog = Watchdog(tmp_path, HostsConfig(lost_s=0.5), clock, left.append, beat_s=0.02)
    peer = Peer(tmp_path, "earlier")
    assert wait(lambda: left) == [75]
    peer.die()
    dog.close()


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, ValueError])
def test_an_error_of_a_message_is_explained_by_who_is_gone(tmp_path, two, clock, error):
    with (
        pytest.raises(HostLost, match=r"host \? \(process 1 of 2\) gave no sign of life for 1 s"),
        watched(tmp_path, HostsConfig(lost_s=0.5), clock),
    ):
        raise error("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"), watched(tmp_path, HostsConfig(), clock):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(UserError), watched(tmp_path, HostsConfig(), clock):
        raise UserError("config.gloo: no such key")


def test_what_a_backend_says_of_a_peer_that_is_gone_need_not_be_known(tmp_path, two, clock):
    with pytest.raises(HostLost, match="gave no sign of life"), watched(tmp_path, HostsConfig(lost_s=0.5), clock):
        raise jax.errors.JaxRuntimeError("INTERNAL: Accelerator device halted prematurely")
    with pytest.raises(ValueError, match="socket"), watched(tmp_path, HostsConfig(), clock):
        raise ValueError("a mistake of ours about a socket")


def test_before_anybody_watches_the_words_of_an_error_say_that_a_host_is_lost(two, monkeypatch):
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset by peer")
    with pytest.raises(HostLost, match="the hosts lost each other"), hosts.lost_is_told():
        raise lost
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), hosts.lost_is_told():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"), hosts.lost_is_told():
        raise lost


def test_who_is_asked_to_stop_is_seen_by_the_others(tmp_path, two, clock):
    dog = Watchdog(tmp_path, HostsConfig(lost_s=60), clock, beat_s=0.02)
    peer = Peer(tmp_path, dog._run)
    assert wait(lambda: dog._signs[1].beat > 2) and not dog.asked
    peer.asked = True
    assert wait(lambda: dog.asked)
    peer.die()
    dog.stopped = lambda: True
    shown = tmp_path / "hosts" / "00000.json"
    assert wait(lambda: json.loads(shown.read_text())["asked"])
    dog.close()


@pytest.mark.parametrize("values", [dict(lost_s=0.0), dict(stall_s=-1.0)])
def test_limits_are_positive(values):
    with pytest.raises(ValueError, match="must be above 0"):
        HostsConfig(**values)
