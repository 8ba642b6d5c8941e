"""Claims about math.py: a table of traps, each a way to be marked wrongly."""

import threading
import time

import pytest

from m1jax.rewards.math import equal, last_boxed, score

RIGHT = [
    # boxes and wrapping
    ("42", r"\boxed{41} so \boxed{42}"), ("42", r"\boxed{42}\boxed{42}"), (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"),
    ("5", "$5$"), ("5", "5."), ("5", r"\(5\)"), ("$5", "5"),
    # folding
    ("-5", "\u22125"), ("5", "\uff15"), ("1000", "1{,}000"), ("1000", "1,000"), ("10080", "10,\\!080"),
    ("(1,2)", "(1,\u20092)"), ("2\\pi", "2π"), ("2*pi", "2\\pi"),
    # numbers
    (r"\frac12", "0.5"), ("-\\frac{1}{2}", "-1/2"), ("1.5", r"1\frac12"), ("10", r"\binom52"), ("7", "007"),
    ("3", "3.0"),
    ("1024", "2^{10}"), (r"\sqrt2", "1.41421356"), ("sqrt(2)", r"\sqrt{2}"), (r"0.\overline{3}", r"\frac13"),
    (r"\frac16", r"0.1\overline{6}"), ("90", r"90^\circ"), ("12", "12 apples"),
    # percent is a unit
    (r"10\%", "10"), ("10", "10%"),
    # letters
    ("A", "A"), ("A", "(a)"), ("C", r"\text{(C)}"), ("E", r"\boxed{C} no, \boxed{\text{E}}"), ("E", "E: a long option"),
    (r"\text{east}", r"\text{East}"), ("True", "true"),
    # algebra, equations, sets, intervals
    ("x^2+2x+1", "(x+1)^2"), ("5", "x=5"), ("x=5", "5"), ("(1,2)", "x=1,y=2"), (r"\pm2", r"\{2,-2\}"),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}"), (r"\{1,2\}", r"\{2,1\}"), (r"(-\infty,5)", "x<5"),
    ("(-∞,5)", "x < 5"), ("[-2,7]", r"x\in[-2,7]"), ("x<5", "x<5"),
    (r"\begin{pmatrix}\frac12\\1\end{pmatrix}", r"\begin{pmatrix}\dfrac12\\1\end{pmatrix}"),
]  # fmt: skip

WRONG = [
    ("42", "41"), ("42", ""), ("42", "41 or 42"), ("42", "41, 42"), ("42", r"\boxed{42} or \boxed{41}"),
    ("42", r"\boxed{42"),
    ("5", "\u22125"), ("5", "**Answer:** 5."), ("5", "5 or 6"), (r"10\%", "0.1"), ("1/3", "0.333"),
    ("ABCD", "DCBA"), ("A", "B"), ("A", "A or B"), ("yes", "no"),
    ("(1,2)", r"\{1,2\}"), ("(1,2)", "{1,2}"), (r"\{1,2\}", "(1,2)"), ("(1,2)", "(2,1)"),
    ("1,2", "1"), (r"\{1,2\}", "1"), ("1", "1,2"),
    ("[1,2]", "(1,2)"), ("(1,2]", "(1,2)"), ("x<5", "x>5"), (r"(-\infty,5)", "x<6"), (r"(-\infty,5)", r"x\le5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), ("10_2", "2"), ("10_2", "10"), ("10_2", "10_3"),
    ("2", "10_2"), ("x^2+2x+1", "x^2+2x+2"),
    ("π", "__import__('os').system('true')π"), ("5", "__import__('os').getpid()"),
]  # fmt: skip

BOMBS = ["10^{10^{10}}", "2^{3^{4^{5}}}", "2^(3^(4^5))", "2**3**4**5", "10^{99999}", "100000!", "{" * 1999,
         "}" * 1999,
         r"\frac{" * 300 + "1", "(" * 1999, "9" * 1999, "9" * 5000,
         r"\overline{3}" * 150, "0." + r"\overline{" + "3" * 900 + "}"]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right(gold, answer):
    assert equal(gold=gold, answer=answer)


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong(gold, answer):
    assert not equal(gold=gold, answer=answer)


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_wrong_and_quick(bomb):
    start = time.process_time()
    assert not equal(gold="5", answer=bomb)
    assert time.process_time() - start < 2  # 5 s each, or 17 s, without the guards


def test_works_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(score(r"\frac{2}{4}", {"answer": "0.5"})))
    thread.start()
    thread.join()
    assert verdicts == [1.0]


def test_last_boxed():
    assert last_boxed(r"\boxed{1} \boxed{\frac{1}{2}} \boxed{3") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed("1") is None
