"""Claims about format.py: which texts are in form, and which of them offer one answer."""

import pytest

from m1jax.rewards.format import extract_answer, format_reward


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("<think> 4+3=7</think><answer>7</answer>", 1, "7"),
        ("\n<think>\na\n</think>\n\n<answer> 7\n</answer>\n", 1, "7"),
        ("<think></think><answer>a < b</answer>", 1, "a < b"),
        ("<think>a</think><answer>7</answer>!", 0, "7"),
        ("so <think>a</think><answer>7</answer>", 0, "7"),
        ("<think>a</think> so <answer>7</answer>", 0, "7"),
        ("<answer>7</answer>", 0, "7"),
        ("<think>a</think><answer> </answer>", 0, None),
        ("<think>a</think>7", 0, None),
        ("<think>a <answer>7</answer>", 0, None),
        ("<think>a <answer>7</answer></think>", 0, None),
        ("<answer>7</answer><think>a</think>", 0, None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", 0, None),
        ("<think>a</think><answer>7", 0, None),
        ("<think>a</think></answer>7<answer>", 0, None),
        ("<think>a</think><think>b</think><answer>7</answer>", 0, "7"),
        ("<think>a</think><answer>7</think></answer>", 0, None),
        ("<think>a</think><answer>7</answer><eos>", 0, "7"),
        ("<THINK>a</THINK><ANSWER>7</ANSWER>", 0, None),
        ("", 0, None),
    ],
)
def test_form_and_answer(text, form, answer):
    assert (format_reward(text), extract_answer(text)) == (form, answer)


def test_long_text_takes_no_time():
    text = "<think>" + "<" * 200_000 + "</think><answer>" + " " * 200_000
    assert format_reward(text) == 0 and extract_answer(text) is None
    assert format_reward(text + "7</answer>") == 1
