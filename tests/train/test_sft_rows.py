"""Rows of next-token training: what is learnt, and texts of one's own."""

import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.train.sft import RowsConfig, Sequences, pack_rows
from tests import runs

ROWS = RowsConfig(per_update=2, tokens=12, micro_batch_rows=2)
PAIRS = [((1, 2, 3), (4, 5)), ((6, 7), (8, 9, 10)), ((11,) * 6, (12,) * 6)]


@pytest.mark.parametrize(("loss_on", "learnt"), [("answers", [4, 5, 8, 9, 10]), ("all", [2, 3, 4, 5, 7, 8, 9, 10])])
def test_the_answers_or_all_but_the_first_token_of_each_text_are_learnt(loss_on, learnt):
    """The first token has nothing before it to be predicted from."""
    batch, cursor = pack_rows([*PAIRS, ((1,) * 11, (1,))], 0, ROWS, loss_on)
    assert cursor == 3
    row = batch.tokens[0, 0], batch.weights[0, 0]
    assert row[0][row[1] > 0].tolist() == learnt
    live = batch.weights[batch.weights > 0]
    assert np.allclose(live, live[0]) and live.sum() == pytest.approx(1)


def shout(problem, rng, reflection):
    return f"{problem.answer}!"


def test_a_text_of_ones_own_follows_the_question():
    sequences = Sequences(runs.sft_config(text=f"{__name__}:shout"))
    prompt, answer = sequences[0]
    assert bytes(i - 7 for i in answer[:-1]).decode().endswith("!") and len(answer) <= 4
    assert (prompt, answer) == Sequences(runs.sft_config(text=f"{__name__}:shout"))[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(text="no.such:text"), "config.text: cannot load 'no.such:text'"),
        (dict(text="math:pi"), "config.text: cannot load 'math:pi' .it is no function"),
        (dict(text=".math:pi"), "config.text: cannot load '.math:pi'"),
        (dict(loss_on="prompts"), "config.loss_on: 'prompts' must be one of"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        runs.sft_config(**values)
