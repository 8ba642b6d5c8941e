"""Claims about problems.py: specs and their errors, disjoint splits, the training source."""

import json
import os
import pickle
import re
import subprocess
import sys

import grain
import pytest

from m1jax.data.problems import TrainProblems, heldout, majority_share, parse_mix, parse_tasks, split_of, split_problems
from m1jax.errors import UserError
from m1jax.types import Problem, Task

DEMO = "count_bits(min_n=1, max_n=2047), chain_sum(min_terms=2, max_terms=4, max_digits=1)"


@pytest.fixture
def rows(tmp_path):
    """Return a writer of JSONL files."""

    def write(*lines, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(tmp_path / name)

    return write


def test_a_spec_names_tasks_in_order(rows):
    path = rows({"prompt": "1+1?", "answer": 2, "level": 1})
    tasks = parse_tasks(f"{DEMO}, {path}, chain_sum(name='long', max_terms=9),")
    assert [task.name for task in tasks] == ["count_bits", "chain_sum", "rows", "long"]
    assert all(isinstance(task, Task) for task in tasks)
    assert re.fullmatch(r"How many 1 bits .* number \d+\?", tasks[0][0].question)
    assert tasks[2][0] == Problem("rows", "1+1?", "2", {"prompt": "1+1?", "answer": "2", "level": 1})


def test_commas_inside_values_do_not_split(rows):
    (task,) = parse_tasks("count_bits(name='a, b', max_n=(2047))")
    assert task.name == "a, b"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no tasks"),
        (" , ", "no tasks"),
        ("count_bit", "nearest: count_bits"),
        ("count_bits(maxn=3)", "no parameter 'maxn'; nearest: max_n"),
        ("count_bits(min_n=5, max_n=2)", "min_n must be between"),
        ("count_bits(min_n='a')", "refuses"),
        ("count_bits(3)", "a task is name"),
        ("count_bits(max_n=__import__('os').getpid())", "a task is name"),
        ("count_bits(", "cannot read"),
        ("count_bits, count_bits(max_n=9)", "2 tasks are called count_bits"),
        ("nowhere.jsonl", "no file nowhere.jsonl"),
        ("no_such_module:make", "no_such_module"),
        ("os:getcwd", "lacks something"),
        ("os:sep", "not a function"),
    ],
)
def test_spec_errors_name_the_mend(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_tasks(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ('{"prompt": "x"}', "line 2: field 'answer' is missing"),
        ('{"answer": "x", "question": "y"}', "line 2: field 'prompt' is missing; the row has 'answer', 'question'"),
        ('{"prompt": " ", "answer": "x"}', "line 2: field 'prompt' is ' '"),
        ('{"prompt": "x", "answer": ""}', "line 2: field 'answer' is empty"),
        ('{"prompt": "x", "answer": [1]}', "line 2: field 'answer' is \\[1\\]"),
    ],
)
def test_malformed_rows_are_named_by_file_line_and_field(rows, line, message):
    with pytest.raises(UserError, match="rows.jsonl " + message):
        parse_tasks(rows({"prompt": "a", "answer": "b"}, line))


def test_user_functions(rows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_for_problems.py").write_text(
        "from m1jax.data.problems import JsonlTask\n"
        "def score(answer, row): return 1.0\n"
        "def make(): return JsonlTask('made', ({'prompt': 'q', 'answer': 'a'},))\n"
    )
    path = rows({"prompt": "a", "answer": "b"})
    own, made = parse_tasks(f"{path}@mine_for_problems:score, mine_for_problems:make")
    assert (own.verifier, made.name) == ("mine_for_problems:score", "made")
    with pytest.raises(UserError, match="scoer"):
        parse_tasks(f"{path}@mine_for_problems:scoer")


# ---------------------------------------------------------------- splits


def test_heldout_and_training_questions_are_disjoint_for_every_seed():
    tasks = parse_tasks(DEMO)
    unseen = {problem.question for task in tasks for problem in heldout(task, 500, 0.3)}
    assert len(unseen) == 1000
    for seed in (0, 1):
        source = TrainProblems(tasks, 0.3, 2000, seed)
        seen = {source[i].question for i in range(len(source))}
        assert len(seen) > 2000 and not seen & unseen


def test_the_split_is_a_matter_of_the_text_alone_and_keeps_its_share():
    # `printf "question 0" | b2sum -l 64` begins 3f; the next ones 5e, d2, de: two below one half, two above.
    assert [split_of(f"question {i}", 0.5) for i in range(4)] == ["heldout", "heldout", "train", "train"]
    share = sum(split_of(str(i), 0.3) == "heldout" for i in range(10_000)) / 10_000
    assert abs(share - 0.3) < 0.015  # three standard deviations
    assert split_of("x", 0.0) == "train"


def test_problems_are_the_same_in_another_process():
    code = (
        "from m1jax.data.problems import heldout, parse_tasks\n"
        f"print([p.question for task in parse_tasks({DEMO!r}) for p in heldout(task, 5, 0.3)])"
    )
    here = [p.question for task in parse_tasks(DEMO) for p in heldout(task, 5, 0.3)]
    there = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True
    )
    assert there.stdout.strip() == str(here), there.stderr


def test_too_few_problems_says_how_many():
    (task,) = parse_tasks("count_bits(min_n=1, max_n=100)")
    total = sum(split_of(f"How many 1 bits are there in the binary representation of the number {n}?", 0.3) == "heldout"
                for n in range(1, 101))  # fmt: skip
    assert len(heldout(task, total, 0.3)) == total
    with pytest.raises(UserError, match=f"count_bits: {total} distinct heldout problems, {total + 1} asked for"):
        heldout(task, total + 1, 0.3)
    assert len(split_problems(task, "train", 100 - total, 0.3)) == 100 - total
    with pytest.raises(UserError, match="heldout_share 0"):
        heldout(task, 1, 0.0)


def test_training_mixes_tasks_in_turn_and_travels():
    source = pickle.loads(pickle.dumps(TrainProblems(parse_tasks(DEMO), 0.3, 100, 0)))
    assert [source[i].task for i in range(4)] == ["count_bits", "chain_sum"] * 2
    assert source[7] == source[7] and len(source) == 200
    with pytest.raises(IndexError):
        source[200]
    shuffled = grain.MapDataset.source(source).seed(0).shuffle().repeat()
    assert isinstance(shuffled[1234], Problem)


def test_seeds_train_on_other_problems():
    tasks = parse_tasks("chain_sum(min_digits=4)")
    a, b = (TrainProblems(tasks, 0.3, 100, seed) for seed in (0, 1))
    assert not {a[i].question for i in range(100)} & {b[i].question for i in range(100)}


def test_a_small_file_is_passed_over_in_whole_passes(rows):
    (task,) = parse_tasks(rows(*({"prompt": f"q{i}", "answer": "a"} for i in range(20))))
    train = {p.question for p in split_problems(task, "train", 1, 0.3)} | {
        f"q{i}" for i in range(20) if split_of(f"q{i}", 0.3) == "train"
    }
    source = TrainProblems([task], 0.3, 3 * len(train), 0)
    passes = [[source[e * len(train) + i].question for i in range(len(train))] for e in range(3)]
    assert all(set(p) == train for p in passes) and passes[0] != passes[1]


def test_a_file_that_is_all_held_out_is_an_error(rows):
    name = next(f"q{i}" for i in range(99) if split_of(f"q{i}", 0.3) == "heldout")
    with pytest.raises(UserError, match="all 1 rows are held out"):
        TrainProblems(parse_tasks(rows({"prompt": name, "answer": "a"})), 0.3, 10, 0)


def test_problems_without_a_solution_are_in_neither_split():
    (task,) = parse_tasks("base_conversion(max_value=1)")  # zero in base 4 is "" to reasoning_gym
    assert any(task[i].answer == "" for i in range(50))
    assert all(p.answer for p in split_problems(task, "train", 50, 0.3) + heldout(task, 20, 0.3))


def test_majority_share():
    problems = [Problem("t", str(i), answer) for i, answer in enumerate(["1", "2", "1", None])]
    assert majority_share(problems) == 0.5
    assert majority_share(problems[3:]) == majority_share([]) == 0.0


def test_mix_says_how_often_each_task_comes():
    """(1, 3): one of the first, three of the second; every item another question, as many rounds as fit."""
    spec = "count_bits(min_n=1, max_n=1000000), 3 * chain_sum"
    assert parse_mix(spec) == (1, 3)
    source = TrainProblems(parse_tasks(spec), share=0.2, problems_per_task=9, seed=0, mix=parse_mix(spec))
    assert len(source) == 12
    names = [source[i].task for i in range(12)]
    assert names == ["count_bits", "chain_sum", "chain_sum", "chain_sum"] * 3
    assert len({source[i].question for i in range(12)}) == 12
    with pytest.raises(UserError, match="tasks: a task with share 0"):
        parse_tasks("count_bits, 0 * chain_sum")
