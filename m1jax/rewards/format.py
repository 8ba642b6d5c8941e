"""The form of a response, as text: one thought, then one answer.

    <think> 4+3=7 7-7=0</think><answer>0</answer>              format 1, answer "0"
    <think> 4+3=7</think> so <answer>7</answer>                format 0 (text outside), answer "7"
    <think> 4+3=7 <answer>7</answer>                           format 0, no answer: the thought never ended
    <think></think><answer>7</answer><answer>8</answer>        format 0, no answer: two were offered

Format and answer are separate on purpose: correctness is asked of an answer that can be found without doubt, and
the format reward then pulls the rest into shape. Text comes without the end token. Nothing here knows whether an
answer is right.
"""

from __future__ import annotations

import re

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_STRICT = re.compile(r"\s*<think>.*</think>\s*<answer>.*\S.*</answer>\s*", re.DOTALL)


def format_reward(text: str) -> float:
    """Return 1.0 where `text` is exactly `<think>…</think><answer>…</answer>`, else 0.0.

    Each tag once and in this order, only white space around and between the two parts, an answer that is not empty.
    """
    return float(all(text.count(tag) == 1 for tag in _TAGS) and _STRICT.fullmatch(text) is not None)


def extract_answer(text: str) -> str | None:
    """Return what stands between the only `<answer>` and the only `</answer>`, stripped; else None.

    None also where that is empty, where a thought was opened and not closed before it, and where one is opened or
    closed after it: an answer inside or before the thought is not one yet.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    thought, _, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed or thought.count("<think>") > thought.count("</think>"):
        return None
    if any(tag in answer + after for tag in ("<think>", "</think>")):
        return None
    return answer.strip() or None
