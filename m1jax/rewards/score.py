"""Rewards of responses: what the verifier says of the answer, plus a little for the form.

    reward = credit + format_weight * format        credit is the verifier's, in [0, 1]; format is 0 or 1

Knows tasks and text only: neither tokens nor groups nor advantages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m1jax.rewards.format import extract_answer, format_reward
from m1jax.rewards.grader import Grader, Job
from m1jax.types import Problem, Task

COUNTED = ("no_answer", "error", "timeout", "unscored")


@dataclass(frozen=True)
class Scores:
    """Rewards of B responses, in their order.

    Attributes:
        rewards: float32 [B], what training maximises; NaN where the verifier gave no score.
        correct: float32 [B], 1 where the verifier gave full credit.
        format: float32 [B], 1 where the form is exact.
        outcomes: how many responses had no answer ("no_answer"), and how the verifier fared with the others
            ("scored", "error", "timeout", "unscored"); sums to B.
    """

    rewards: np.ndarray
    correct: np.ndarray
    format: np.ndarray
    outcomes: Mapping[str, int]

    def metrics(self) -> dict[str, float]:
        """Return the share of responses in good form and, by outcome, that of those whose answer was not scored."""
        shares = {f"reward/{name}": self.outcomes.get(name, 0) / max(1, len(self.format)) for name in COUNTED}
        return {"reward/format": float(self.format.mean()) if len(self.format) else 0.0, **shares}


def interleaved(parts: Sequence[Scores]) -> Scores:
    """Scores of responses that were dealt out like cards: the first part has those of number 0, n, 2 n, ..."""
    total, n = sum(len(part.rewards) for part in parts), len(parts)
    arrays = {name: np.zeros(total, np.float32) for name in ("rewards", "correct", "format")}
    for i, part in enumerate(parts):
        for name, array in arrays.items():
            array[i::n] = getattr(part, name)
    outcomes = sum((Counter(part.outcomes) for part in parts), Counter())
    return Scores(**arrays, outcomes=dict(outcomes))


def score_responses(
    grader: Grader,
    tasks: Mapping[str, Task],
    problems: Sequence[Problem],
    texts: Sequence[str],
    format_weight: float = 0.0,
) -> Scores:
    """Return the rewards of `texts`, response by response.

    Args:
        grader: runs the verifiers.
        tasks: tasks of the run by name; `Problem.task` names one of them.
        problems: [B], what each response answers.
        texts: [B], responses as text, the end token left out.
        format_weight: what the exact form is worth beside a correct answer.

    A response without an answer is wrong, and no verifier is asked. One that raises or takes too long has judged the
    answer: it is wrong. One that returns None or NaN has not: the response has no reward. A verifier's partial credit
    is a reward, but only full credit is correct. (Our own verifiers give 0 or 1.)
    """
    answers = [extract_answer(text) for text in texts]
    asked = {index: answer for index, answer in enumerate(answers) if answer is not None}
    verdicts = grader.score(
        [Job(tasks[problems[i].task].verifier, answer, problems[i].row) for i, answer in asked.items()]
    )

    credit = np.zeros(len(texts), np.float32)
    credit[list(asked)] = [verdict.score for verdict in verdicts]
    format = np.array([format_reward(text) for text in texts], np.float32)
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    outcomes["no_answer"] = len(texts) - len(asked)
    correct = (credit >= 1.0).astype(np.float32)
    return Scores(credit + np.float32(format_weight) * format, correct, format, dict(outcomes))
