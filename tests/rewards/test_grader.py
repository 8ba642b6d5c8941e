"""Claims about grader.py and score.py: one verdict for each job, whatever the verifier does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from m1jax.data.problems import heldout, parse_tasks
from m1jax.rewards.grader import Grader, Job
from m1jax.rewards.score import score_responses
from m1jax.types import Problem, Verdict

VERIFIERS = """
import ctypes, os, signal, sys, time
def value(answer, row): return row["value"]
def echo(answer, row): return float(answer)
def hang(answer, row):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    while True:
        try:
            while True: pass
        except BaseException: pass
def sleep(answer, row): time.sleep(60)
def raises(answer, row): raise RuntimeError
def none(answer, row): return None
def leaves(answer, row): os._exit(0)
def exits(answer, row): sys.exit(1)
def crashes(answer, row): ctypes.string_at(0)
def hoards(answer, row): return len(bytearray(10 << 30))
def prints(answer, row): print("[0, 1.0]", flush=True); return 0.25
def imports(answer, row): return float("jax" in sys.modules or "numpy" in sys.modules)
def keys(answer, row): return float(any(name.startswith("SGLANG_") for name in os.environ))
def pid(answer, row): open(row["file"], "a").write(f"{os.getpid()} "); return 1
"""


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "verifiers_for_tests.py").write_text(VERIFIERS)
    sys.path.insert(0, str(folder))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("SGLANG_ADMIN_KEY", "secret")
    with Grader(workers=2, cpu_seconds=0.5, wall_seconds=3.0) as grader:
        yield grader
    monkeypatch.undo()
    sys.path.remove(str(folder))


def job(name, answer="x", **row):
    return Job(f"verifiers_for_tests:{name}", answer, row)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("hang", Verdict(0.0, "timeout")),
        ("sleep", Verdict(0.0, "timeout")),
        ("raises", Verdict(0.0, "error")),
        ("leaves", Verdict(0.0, "error")),
        ("exits", Verdict(0.0, "error")),
        ("crashes", Verdict(0.0, "error")),
        ("hoards", Verdict(0.0, "error")),
        ("missing", Verdict(0.0, "error")),
        ("prints", Verdict(0.25)),
        ("imports", Verdict(0.0)),
        ("keys", Verdict(0.0)),
    ],
)
def test_a_bad_job_costs_itself_only(grader, name, verdict):
    before = dict(grader.counts)
    jobs = [job("echo", str(i / 16)) for i in range(16)]
    jobs.insert(5, job(name))
    expected = [Verdict(i / 16) for i in range(16)]
    expected.insert(5, verdict)
    assert grader.score(jobs) == expected
    counted = {outcome: grader.counts[outcome] - before.get(outcome, 0) for outcome in grader.counts}
    assert sum(counted.values()) == 17
    assert counted[verdict.outcome] == (17 if verdict.outcome == "scored" else 1)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("inf"), "high"])
def test_values_that_are_no_score(grader, value):
    assert grader.score([job("value", value=value)]) == [Verdict(0.0, "error")]


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_verifier_that_does_not_know_gives_no_score(grader, value):
    """And no zero: the response then has no reward, which is not the same as a bad one."""
    before, unknown = dict(grader.counts), job("value", value=value)
    first, second, third = grader.score([unknown, job("echo", "1"), unknown])
    assert np.isnan([first.score, third.score]).all() and {first.outcome, third.outcome} == {"unscored"}
    assert second == Verdict(1.0) and grader.counts["unscored"] - before.get("unscored", 0) == 2


def test_two_hangs_in_one_chunk(grader):
    verdicts = grader.score([job("hang"), job("echo", "1"), job("hang"), job("echo", "1")] + [job("echo", "1")] * 40)
    assert [i for i, v in enumerate(verdicts) if v == Verdict(0.0, "timeout")] == [0, 2]
    assert sum(v == Verdict(1.0) for v in verdicts) == 42


def test_no_jobs(grader):
    assert grader.score([]) == []


def test_many_large_jobs_do_not_jam_the_pipes(grader):
    assert grader.score([job("echo", "0.5", text="x" * 100_000)] * 64) == [Verdict(0.5)] * 64


def test_a_worker_killed_while_idle_costs_nothing(grader, tmp_path):
    file = tmp_path / "pids"
    grader.score([job("pid", file=str(file))] * 8)
    for pid in set(file.read_text().split()):
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1)
    assert grader.score([job("echo", "1")] * 8) == [Verdict(1.0)] * 8


def test_workers_die_with_their_parent(grader, tmp_path):
    code = (
        "import os, signal; from m1jax.rewards.grader import Grader, Job\n"
        "grader = Grader(workers=1)\n"
        f"grader.score([Job('verifiers_for_tests:pid', '', {{'file': {str(tmp_path / 'pid')!r}}})])\n"
        "worker = grader._workers[0]\n"
        "grader._send(worker, [[0, 'verifiers_for_tests:sleep', '', {}]])\n"  # it is in the middle of a job
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # dead; whoever inherited it has not noticed
        time.sleep(0.1)
    pytest.fail(f"worker {pid} lives on")


def test_close_and_start_anew(grader):
    grader.close()
    grader.warm_up(["verifiers_for_tests:echo"])
    assert grader.score([job("echo", "1")]) == [Verdict(1.0)]


def test_settings_are_checked():
    for name in ("workers", "cpu_seconds", "wall_seconds"):
        with pytest.raises(ValueError, match=name):
            Grader(**{name: 0})


def test_a_batch_of_responses_is_scored_fast_and_right():
    tasks = {task.name: task for task in parse_tasks("count_bits(max_n=2047), chain_sum(max_terms=4, max_digits=1)")}
    problems = [problem for task in tasks.values() for problem in heldout(task, 256, 0.3)]
    with Grader(workers=2) as grader:
        texts = [f"<think></think><answer>{p.answer}</answer>" for p in problems]
        texts[::4] = [f"<think></think><answer>{p.answer}1</answer>" for p in problems[::4]]
        grader.warm_up([task.verifier for task in tasks.values()])
        score_responses(grader, tasks, problems, texts)
        start = time.perf_counter()
        scores = score_responses(grader, tasks, problems, texts)
        assert time.perf_counter() - start < 0.5  # 0.02 s on an idle machine
    assert (scores.correct == [i % 4 != 0 for i in range(512)]).all()
    assert scores.outcomes == {"scored": 512, "no_answer": 0}


def test_rewards_by_hand(grader, tmp_path):
    class Own:
        name, verifier = "own", "verifiers_for_tests:echo"

    class Broken:
        name, verifier = "broken", "verifiers_for_tests:raises"

    cases = [  # task, text, reward, correct, format
        ("own", "<think>a</think><answer>1</answer>", 1.25, 1, 1),
        ("own", "so <answer>1</answer>", 1.0, 1, 0),
        ("own", "<think>a</think><answer>0.5</answer>", 0.75, 0, 1),  # partial credit pays, but is not correct
        ("own", "<think>a <answer>1</answer>", 0.0, 0, 0),  # no answer
        ("broken", "<think>a</think><answer>1</answer>", 0.25, 0, 1),
    ]
    scores = score_responses(
        grader,
        {"own": Own, "broken": Broken},
        [Problem(task, "q", None, {}) for task, *_ in cases],
        [text for _, text, *_ in cases],
        format_weight=0.25,
    )
    assert list(zip(scores.rewards, scores.correct, scores.format, strict=True)) == [case[2:] for case in cases]
    assert scores.outcomes == {"scored": 3, "error": 1, "no_answer": 1}
    expected = {"format": 0.6, "no_answer": 0.2, "error": 0.2, "timeout": 0.0, "unscored": 0.0}
    assert scores.metrics() == pytest.approx({f"reward/{name}": share for name, share in expected.items()})
