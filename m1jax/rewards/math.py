"""Is this the same mathematics as the reference? math-verify, behind our own extraction and guards.

math-verify knows LaTeX and SymPy; alone it also merges several boxes, reads "ABCD" as a product of symbols, takes a
set for a tuple, and spends seconds on 10^{10^{10}}. What we settle before asking it:

* the last balanced \\boxed{} counts, else the whole answer; over 2,000 characters is wrong;
* Unicode minus signs, full-width forms and thin spaces become plain; text equal by then is right;
* letters only ("B", "ABCD", "\\text{east}") are compared as text, case aside; for a choice "(B)" and "B: ..." are B;
* a tuple is not a set: brackets of different kind are wrong;
* a percent sign is a unit: 10\\% is 10, never 0.1;
* numbers in a base (10_2) are compared as text; repeating decimals become fractions;
* a bare number may carry a unit in words ("12 apples"); the answer to a number with several numbers in it is wrong;
* an exponent of numbers that is nested or over four digits is wrong, unparsed; so are braces that do not balance and
  brackets more than 20 deep (the parser takes 17 s over 2,000 open ones).

Decimals agree when they round alike to six places: 1.41421356 is \\sqrt2, 0.333 is not 1/3. There is no clock here
(math-verify's own needs the main thread's alarm): the grader bounds what slips through.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at every call that its clock is off

MAX_LENGTH = 2000
MAX_DEPTH = 20

_FOLD = {ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"}
_FOLD |= {space: " " for space in (0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)}
_FOLD |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code not in _FOLD}
_FOLD |= {ord("\u221e"): r"\infty ", ord("\u2264"): r"\le ", ord("\u2265"): r"\ge ", ord("\u03c0"): r"\pi ",
          ord("\u00d7"): r"\times ", ord("\u00b7"): r"\cdot ", ord("\u2208"): r"\in "}  # fmt: skip

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def score(answer: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 where `answer` equals `row["answer"]`, else 0.0."""
    return float(equal(gold=str(row["answer"]), answer=answer))


def equal(*, gold: str, answer: str) -> bool:
    """Return whether `answer` is the same mathematics as the reference `gold` (keywords only: they do not commute)."""
    if len(answer) > MAX_LENGTH:
        return False
    gold, answer = _plain(gold), _plain(answer)
    if not gold or not answer:
        return False
    if gold == answer:
        return True
    if letters := _letters(gold):
        return letters == (_choice(answer) if len(letters) == 1 else _letters(answer))
    if _kind(gold) and _kind(answer) and _kind(gold) != _kind(answer):
        return False
    if any(_in_a_base(text) or _explodes(text) or not _balanced(text) for text in (gold, answer)):
        return False
    if re.fullmatch(_NUMBER, gold) and (unit := re.fullmatch(rf"({_NUMBER})\s*[A-Za-z][A-Za-z ]*", answer)):
        answer = unit[1]
    left, right = _parse(gold), _parse(answer)
    if not left or not right:
        return False
    same = verify(left, right, timeout_seconds=None)
    # The range x < 5 for the interval (-oo, 5): math-verify reads that only in the other direction.
    if not same and _kind(gold) and re.search(r"[<>]|\\[lg]eq?\b|\\in\b", answer):
        same = verify(right, left, timeout_seconds=None)
    return same


def last_boxed(text: str) -> str | None:
    """Return what the last balanced \\boxed{} (or \\fbox{}) of `text` holds, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            if depth == 0:
                return text[match.end() : at]
    return None


def _plain(text: str) -> str:
    """Return the expression itself: unboxed, folded, without dollars, spacing commands, percent and final stop."""
    text = text.translate(_FOLD)
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    text = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad)(?![A-Za-z])", "", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = re.sub(r"\\[()\[\]](?=\s|$)|^\s*\\[(\[]|\$", "", text)
    text = re.sub(r"\\?%|\^\{?\\circ\}?|\u00b0", "", text)
    text = re.sub(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating, text)
    text = re.sub(r"\\binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} is (16 - 1) / 90."""
    sign, whole, fixed, cycle = match.groups()
    if len(whole + fixed + cycle) > 40:
        return match[0]
    below = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    above = int((whole or "0") + fixed + cycle) - int((whole or "0") + (fixed or ""))
    return f"{sign}\\frac{{{above}}}{{{below}}}"


def _letters(text: str) -> str:
    """Return a text of letters only, bare or in \\text{}, bold or round brackets, in lower case; "" if it is not."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip()
    text = re.sub(r"^\((.*)\)$", r"\1", text).strip()
    return text.lower() if re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+)*", text) else ""


def _choice(text: str) -> str:
    """Return the letter that an answer to a multiple choice picks: of "B", "(B)", "B: a long option"."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text).strip()
    match = re.match(r"\(?([A-Za-z])\)?(?:$|[:.)]\s)", text)
    return match[1].lower() if match else ""


def _kind(text: str) -> str:
    """Return "(" for a tuple or an interval, "{" for a set, "" where `text` is no list."""
    match = re.fullmatch(r"(\(|\[|\\?\{).*,.*(\)|\]|\\?\})", text)
    return match[1][-1].replace("[", "(") if match else ""


def _in_a_base(text: str) -> bool:
    return re.search(r"\d\s*_\s*\{?\s*\d", text) is not None


def _explodes(text: str) -> bool:
    """Whether a power (or factorial) of numbers is too large to be anybody's answer."""
    if re.search(r"\d{5,}\s*\}*\s*\)*\s*!|\^\s*\{?\s*[-+]?\d{5,}|!\s*!|!\s*\)\s*!", text):
        return True
    return re.search(r"\^\s*[{(]*\s*[-+]?[\d.]+\s*[})]*\s*(\^|\*\*)|\*\*\s*\(*\d+\)*\s*(\*\*|\^)", text) is not None


def _balanced(text: str) -> bool:
    """Whether braces close in order, and no bracket of any kind stands more than MAX_DEPTH deep."""
    braces = depth = 0
    for bracket in re.findall(r"[\[\](){}]", text):
        step = 1 if bracket in "([{" else -1
        depth += step
        braces += step if bracket in "{}" else 0
        if braces < 0 or depth > MAX_DEPTH:
            return False
    return braces == 0


def _parse(text: str) -> list:
    # LaTeX only: the plain reader takes whichever number comes last, so "41 or 42" would offer both.
    text = re.sub(r"\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", re.sub(r"(?<!\\)\b(pi|infty)\b", r"\\\1", text))
    return parse(f"${text.replace('**', '^')}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=0)
