"""The driver that lets two sides take turns: it needs neither torch nor a model, a script plays the sides."""

from __future__ import annotations

import os
import sys

import pytest

from experiments.bench.peers import page
from experiments.bench.peers.__main__ import chosen, compare, main, parity
from experiments.bench.peers.protocol import ROOT, Side, SideFailed
from experiments.bench.peers.workloads import CHARACTERS, TOKENS, WORKLOADS, prompts, reward, tokenizer_json
from m1jax.data.tokenizer import load_tokenizer
from m1jax.errors import UserError

SIDE = """
import sys
from experiments.bench.peers.protocol import Prepared, serve

order, parameters = sys.argv[1], int(sys.argv[2])

def prepare(name):
    def run():
        print("a library talks")
        with open(order, "a") as file:
            file.write(sys.argv[3])
        return {"updates": 2, "tokens": 10}
    if name == "backward 4x1024":
        raise MemoryError("far too large\\nfor this")
    if name == "backward 1x4096":
        sys.exit("no more of this")
    return Prepared(run, {"parameters": parameters, "setting": "fake"})

def parity(policy, anchor, advantages, mask, weight_cap):
    shift = 0.25 if sys.argv[3] == "b" else 0.0
    return {"loss": 1.0 + shift, "gradient": [[1.0 + 2 * shift for _ in row] for row in policy]}

serve(prepare, {"python": "3"}, {"parity": parity})
"""


@pytest.fixture
def make_side(tmp_path, monkeypatch):
    """A function (name, letter, parameters) -> Side; every measurement writes the letter into tmp_path / "order"."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    (tmp_path / "side.py").write_text(SIDE)
    sides = []

    def make(name: str, letter: str, parameters: int = 7) -> Side:
        command = [sys.executable, str(tmp_path / "side.py"), str(tmp_path / "order"), str(parameters), letter]
        sides.append(Side(name, command, os.sched_getaffinity(0), tmp_path / f"{name}.log"))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


def test_sides_take_turns(make_side, tmp_path, capsys):
    results = compare(["rl 1", "rl 16"], [make_side("m1jax", "a"), make_side("peer", "b")], rounds=2)
    # Preparing runs each once; then the first round begins with a, the second with b.
    assert (tmp_path / "order").read_text() == "abab" + "abab" + "baba"
    assert [len(side["rounds"]) for side in results["rl 1"].values()] == [2, 2]
    reply = results["rl 16"]["peer"]["rounds"][0]
    assert reply["wall"] > 0 and reply["cpu"] > 0 and reply["tokens"] == 10
    assert "a library talks" in (tmp_path / "peer.log").read_text()  # not among the answers


def test_sides_of_different_size_are_not_compared(make_side):
    with pytest.raises(UserError, match="differ in their parameters.*7.*8"):
        compare(["rl 1"], [make_side("m1jax", "a"), make_side("peer", "b", 8)], rounds=1)


def test_what_goes_wrong_in_a_side_is_one_line(make_side, tmp_path):
    side = make_side("peer", "b")
    with pytest.raises(SideFailed, match=r"peer: prepare backward 4x1024: MemoryError: far too large \(see"):
        side.ask("prepare", name="backward 4x1024")
    assert side.ask("versions") == {"python": "3"}  # it goes on
    with pytest.raises(SideFailed, match=r"peer: ended with code 1 \(no more of this"):
        side.ask("prepare", name="backward 1x4096")
    with pytest.raises(SideFailed, match="gone: cannot start"):
        Side("gone", [str(tmp_path / "nothing")], os.sched_getaffinity(0), tmp_path / "gone.log")


def test_what_is_forgotten_cannot_be_measured(make_side):
    side = make_side("peer", "b")
    side.ask("prepare", name="rl 1")
    assert side.ask("forget", name="rl 1") == {}
    with pytest.raises(SideFailed, match="peer: measure rl 1: KeyError"):
        side.ask("measure", name="rl 1")


def test_parity_takes_the_largest_difference(make_side):
    found = parity([make_side("m1jax", "a"), make_side("peer", "b")], rows=2, tokens=3)
    assert found == {
        "loss": 1.0, "loss_difference": 0.25, "largest_gradient": 1.5, "largest_gradient_difference": 0.5,
    }  # fmt: skip


def test_ratio_by_hand():
    assert page.ratio([1.0, 2.0, 3.0], [4.0, 6.0, 6.0], higher_is_better=False) == (3.0, 2.0, 4.0)
    assert page.ratio([10.0, 20.0, 60.0], [5.0, 5.0, 10.0], higher_is_better=True) == (4.0, 2.0, 6.0)


def test_table_by_hand():
    prepared = {"wall": 1.25, "cpu": 1.0, "parameters": 1001600, "setting": "fake"}
    rounds = [{"wall": 4.0, "cpu": 2.0, "updates": 2, "tokens": 3000}]
    twice = [{"wall": 8.0, "cpu": 3.0, "updates": 2, "tokens": 3000}]
    sides = {"m1jax": {"prepare": prepared, "rounds": rounds}, "trl": {"prepare": prepared, "rounds": twice}}
    results = {
        "machine": {"cpu": "a CPU", "cores": 2, "load_before": 0.0},
        "versions": {"trl": {"torch": "2"}},
        "workloads": {"rl 16": sides},
        "parity": {
            "loss": 0.5, "loss_difference": 1e-8, "largest_gradient": 0.02, "largest_gradient_difference": 2e-9,
        },
    }  # fmt: skip
    lines = page.lines(results)
    assert "- trl: torch 2" in lines
    assert "| rl 16 | CPU s per update | 1 (1 to 1) | trl 1.5 (1.5 to 1.5) | **1.50** (1.50 to 1.50) |" in lines
    assert "|  | wall s per update | 2 (2 to 2) | trl 4 (4 to 4) | **2.00** (2.00 to 2.00) |" in lines
    assert "| rl 16 | m1jax | 1,001,600 | 1.2 | fake | updates 2, tokens 3,000 |" in lines
    assert lines[-1].endswith("difference 1.0e-08; largest gradient 2.0e-02, largest difference 2.0e-09")


def test_names_are_chosen_by_their_beginnings():
    assert chosen("") == [*WORKLOADS, "parity"]
    assert chosen("rl 16, forward 1") == ["forward 1x4096", "rl 16", "rl 16 larger"]
    with pytest.raises(UserError, match="nothing begins with 'rm'"):
        chosen("rl,rm")


def test_python_without_peers(tmp_path, capsys):
    assert main([f"--peer_python={tmp_path / 'nothing'}", f"--workdir={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --peer_python: {tmp_path / 'nothing'} is no Python that runs")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without its packages
    bare.chmod(0o755)
    assert main([f"--peer_python={bare}", f"--workdir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "lacks torch, transformers, trl" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_the_toy_task(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == len(TOKENS) == 64 and tokenizer.stop_ids == (1,)
    assert tokenizer.decode(tokenizer.encode(CHARACTERS)) == CHARACTERS
    assert reward("77a7") == 3 / 8
    assert prompts(3, 4) == prompts(3, 4) and {len(text) for text in prompts(3, 4)} == {4}
