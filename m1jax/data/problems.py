"""Tasks from one line of text, and which of their problems may be trained on.

    count_bits(min_n=1, max_n=2047), chain_sum(max_terms=4)   reasoning_gym data sets with their parameters
    rows.jsonl                                                {"prompt": ..., "answer": ...} rows, by math-verify
    rows.jsonl@my_module:score                                the same rows, scored by score(answer, row) -> float
    my_module:make_task                                       whatever object that function returns (a types.Task)
    count_bits, 3 * chain_sum                                 three problems of the second for one of the first

Whether a problem is held out depends on the hash of its question and the held-out share alone, so held-out questions
are disjoint from everything that SFT and RL see at that share, whatever the seeds. Nothing here knows tokens or models.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from m1jax.errors import UserError
from m1jax.types import Problem, Task

Split = Literal["train", "heldout"]


# ---------------------------------------------------------------- tasks


@dataclasses.dataclass(frozen=True)
class GymTask:
    """A reasoning_gym data set: problem `index` is made when it is asked for.

    Attributes:
        name: name in tables; the data set's own unless the spec says `name="..."`.
        dataset: the registered name.
        params: repr of the keyword arguments, seed included (text, so that the task is hashable and picklable).
    """

    name: str
    dataset: str
    params: str
    verifier: str = "m1jax.rewards.reasoning_gym:score"

    def __len__(self) -> int:
        return _gym_length(self.dataset, self.params)

    def __getitem__(self, index: int) -> Problem:
        entry = dict(_gym_dataset(self.dataset, self.params)[index])
        row = {"dataset": self.dataset, "params": ast.literal_eval(self.params), "entry": entry}
        return Problem(self.name, entry["question"], entry["answer"], row)


@dataclasses.dataclass(frozen=True)
class JsonlTask:
    """Rows of a JSONL file; a row's "prompt" is the question and its "answer" the reference."""

    name: str
    rows: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    verifier: str = "m1jax.rewards.math:score"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Problem:
        row = self.rows[index]
        return Problem(self.name, row["prompt"], row["answer"], row)


def parse_tasks(spec: str) -> list[Task]:
    """Return the tasks of a comma-separated spec, in its order (the forms: see above).

    Raises:
        UserError: no tasks, an unknown data set or parameter, a missing file or function, a malformed row, two tasks
            of one name.
    """
    tasks = [_parse_task(item) for _, item in _shares(spec)]
    if not tasks:
        raise UserError('tasks: no tasks; name at least one, as in --config.tasks="count_bits(max_n=2047)"')
    for name, uses in Counter(task.name for task in tasks).items():
        if uses > 1:
            raise UserError(f'tasks: {uses} tasks are called {name}; give one another name: {name}(name="other", ...)')
    return tasks


def parse_mix(spec: str) -> tuple[int, ...]:
    """Return how often each task of a spec comes in a round: the 3 of `3 * chain_sum`, else 1."""
    return tuple(share for share, _ in _shares(spec))


def _shares(spec: str) -> list[tuple[int, str]]:
    """Return (share, task) of every item."""
    matches = [re.fullmatch(r"(?:(\d+)\s*\*\s*)?(.+)", item, re.DOTALL) for item in _split_spec(spec)]
    shares = [(int(match[1] or 1), match[2]) for match in matches if match]
    if any(share == 0 for share, _ in shares):
        raise UserError(f"tasks: a task with share 0 in {spec!r}; leave it out, or give it at least 1")
    return shares


def _split_spec(spec: str) -> list[str]:
    """Return the items between the commas that stand in no bracket and no string."""
    items, start, depth, quote = [], 0, 0, ""
    for at, char in enumerate(spec):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            items.append(spec[start:at])
            start = at + 1
    return [item.strip() for item in [*items, spec[start:]] if item.strip()]


def _parse_task(item: str) -> Task:
    path, at, function = item.partition("@")
    if path.endswith(".jsonl"):
        verifier = _function(function, item) and function if at else "m1jax.rewards.math:score"
        return _jsonl_task(Path(path), verifier)
    if re.fullmatch(r"[\w.]+:[\w.]+", item):
        task = _function(item, item)()
        if not isinstance(task, Task):
            raise UserError(f"tasks: {item} returned {type(task).__name__}, which lacks something of m1jax.types.Task")
        return task
    return _gym_task(item)


def _function(name: str, item: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        function = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"tasks: {item}: cannot load {name!r} ({error}); write module:function") from error
    if not callable(function):
        raise UserError(f"tasks: {item}: {name!r} is a {type(function).__name__}, not a function")
    return function


def _gym_task(item: str) -> GymTask:
    from reasoning_gym.factory import DATASETS

    try:
        call = ast.parse(item, mode="eval").body
        call = call if isinstance(call, ast.Call) else ast.Call(call, [], [])
        if not isinstance(call.func, ast.Name) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not name(key=value, ...)")
        name, params = call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        forms = "name(key=value, ...), path.jsonl, path.jsonl@module:function or module:function"
        raise UserError(f"tasks: cannot read {item!r}; a task is {forms}") from error

    if name not in DATASETS:
        raise UserError(f"tasks: reasoning_gym has no task {name!r}; {_nearest(name, DATASETS)}")
    title = params.pop("name", name)
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])}
    for key in params:
        if key not in known:
            raise UserError(f"tasks: {name} has no parameter {key!r}; {_nearest(key, known)}")
    params = {"seed": 0, **params}  # without one the package draws a seed, and no run could be repeated
    try:
        _gym_dataset(name, repr(params))[0]
    except Exception as error:  # the package validates by assert, and trips over what it does not validate
        raise UserError(f"tasks: {item}: reasoning_gym refuses it: {error or type(error).__name__}") from error
    return GymTask(title, name, repr(params))


def _gym_dataset(name: str, params: str):
    from m1jax.rewards.reasoning_gym import dataset  # a second of imports, only for those who name such a task

    return dataset(name, params)


@functools.lru_cache(maxsize=64)
def _gym_length(name: str, params: str) -> int:
    """Return how many problems can be asked for: a million, the size asked for, or what a few sets hold in memory."""
    data, endless = _gym_dataset(name, params), 1_000_000
    if "size" in ast.literal_eval(params):
        return len(data)
    try:
        data[endless - 1]
    except IndexError:
        return len(data)
    return endless


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.4)
    return "nearest: " + ", ".join(near) if near else "there are: " + ", ".join(sorted(known))


def _jsonl_task(path: Path, verifier: str) -> JsonlTask:
    if not path.is_file():
        raise UserError(f"tasks: no file {path}; a task of rows is the path of a JSONL file")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_row(line, f"{path} line {number}"))
    if not rows:
        raise UserError(f'tasks: {path} has no rows; write one {{"prompt": "...", "answer": "..."}} a line')
    return JsonlTask(path.stem, tuple(rows), verifier)


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}; write an object {{"prompt": "...", "answer": "..."}}')
    for field in ("prompt", "answer"):
        if field not in row:
            raise UserError(f"{where}: field {field!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise UserError(f"{where}: field 'prompt' is {row['prompt']!r}; it must be text that is not empty")
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], (str, int, float)):
        raise UserError(f"{where}: field 'answer' is {row['answer']!r}; it must be text or a number")
    row["answer"] = str(row["answer"])
    if not row["answer"].strip():
        raise UserError(f"{where}: field 'answer' is empty; an empty reference can never be matched")
    return row


# ---------------------------------------------------------------- splits


def split_of(question: str, heldout_share: float) -> Split:
    """Return the split of a question: its hash, read as a number in [0, 1), against the share."""
    digest = blake2b(question.encode("utf-8", errors="replace"), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") / 2**64 < heldout_share else "train"


def _belongs(problem: Problem, split: Split, heldout_share: float) -> bool:
    """Whether a problem is in `split`; one whose reference is empty text (reasoning_gym has some) is in neither."""
    return problem.answer != "" and split_of(problem.question, heldout_share) == split


def split_problems(task: Task, split: Split, count: int, heldout_share: float) -> list[Problem]:
    """Return the first `count` problems of distinct question in `split`.

    Raises:
        UserError: there are fewer; the message says how many and what to change.
    """
    share = heldout_share if split == "heldout" else 1 - heldout_share
    # The gap since the last new question that ends the search. Drawing at random from fewer than count / share
    # questions in all, one that was never seen would have come up in this many draws but once in e^20 times.
    patience = 20 * count / max(share, 1e-9) + 20
    found: dict[str, Problem] = {}
    gap = 0
    for index in range(len(task) if share > 0 else 0):
        if len(found) == count or gap > patience:
            break
        problem = task[index]
        gap += 1
        if _belongs(problem, split, heldout_share) and problem.question not in found:
            found[problem.question], gap = problem, 0
    if len(found) < count:
        raise UserError(
            f"task {task.name}: {len(found)} distinct {split} problems, {count} asked for; ask for fewer, widen the "
            f"task's parameters (or add rows), or change heldout_share {heldout_share}"
        )
    return list(found.values())


def heldout(task: Task, count: int, share: float) -> list[Problem]:
    """Return exactly `count` held-out problems of distinct question. Raises as `split_problems` does."""
    return split_problems(task, "heldout", count, share)


class TrainProblems:
    """Training problems of several tasks in turn: with mix (1, 3) the items belong to tasks 0 1 1 1 0 1 1 1 ...

    A random-access source without state, fit for `grain.MapDataset.source` and picklable where its tasks are. A task
    with more than `problems_per_task` problems offers that many, each found when asked for; a smaller one (a JSONL
    file) is read once and its training rows come again in a new order, pass after pass, until the number is reached.
    """

    def __init__(self, tasks: Sequence[Task], share: float, problems_per_task: int, seed: int, mix: Sequence[int] = ()):
        """Make the source; `seed` chooses which problems of a large task, and the order of a small one.

        Raises:
            UserError: a small task has no training rows.
        """
        mix = tuple(mix) or (1,) * len(tasks)
        # Of every task, which of its places in a round each item of the round takes.
        self._round = [(which, place) for which, count in enumerate(mix) for place in range(count)]
        self._mix, self._rounds = mix, problems_per_task // max(mix)
        self.tasks, self.share, self.problems_per_task, self.seed = tuple(tasks), share, problems_per_task, seed
        self._small = {task.name: self._train_indices(task) for task in self.tasks if len(task) <= problems_per_task}

    def __len__(self) -> int:
        return self._rounds * len(self._round)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        turn, item = divmod(index, len(self._round))
        which, place = self._round[item]
        place += turn * self._mix[which]
        task = self.tasks[which]
        if task.name in self._small:
            order = self._small[task.name]
            epoch, at = divmod(place, len(order))
            return task[_shuffled(len(order), f"{self.seed} {task.name} {epoch}", order)[at]]
        for candidate in self._candidates(task, place):
            problem = task[candidate]
            if _belongs(problem, "train", self.share):
                return problem
        raise UserError(f"task {task.name}: no training problems at all; lower heldout_share {self.share}")

    def _candidates(self, task: Task, place: int) -> Iterator[int]:
        """Indices that `place` may take, of which no other place is offered one before it has tried its own."""
        length, stride = len(task), self.problems_per_task
        offset = random.Random(f"{self.seed} {task.name}").randrange(length)
        for step in range(stride):  # its own indices place, place + stride, ...; then those of the next place
            for candidate in range((place + step) % stride, length, stride):
                yield (offset + candidate) % length

    def _train_indices(self, task: Task) -> tuple[int, ...]:
        kept = tuple(i for i in range(len(task)) if _belongs(task[i], "train", self.share))
        if not kept:
            raise UserError(f"task {task.name}: all {len(task)} rows are held out; lower heldout_share {self.share}")
        return kept


@functools.lru_cache(maxsize=64)
def _shuffled(length: int, seed: str, order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(order, length))


def majority_share(problems: Sequence[Problem]) -> float:
    """Return the accuracy of always giving the most frequent reference answer; 0 where there is none."""
    answers = Counter(problem.answer for problem in problems if problem.answer is not None)
    return max(answers.values()) / len(problems) if answers else 0.0
