"""A run in one file."""

import pytest

from m1jax.train.logged import Logged, read_logged, write_logged


def test_what_is_written_comes_back_with_five_digits(tmp_path):
    path = tmp_path / "there" / "run.jsonl"
    rows = [{"step": 0, "a": 0.123456789}, {"step": 1, "a": None, "b": 12345678}, {"step": 2, "a": 1e-19}]
    write_logged(path, {"seed": 3, "rate": 0.123456789}, rows)
    run = Logged(*read_logged(path))
    assert run.about == {"seed": 3, "rate": 0.123456789}
    assert run.rows == [{"step": 0, "a": 0.12346}, {"step": 1, "b": 12345678}, {"step": 2, "a": 1e-19}]
    steps, values = run.curve("a")
    assert steps.tolist() == [0, 2] and values.tolist() == [0.12346, 1e-19] and run.curve("c")[1].size == 0
    assert [p.name for p in path.parent.iterdir()] == ["run.jsonl"]


def test_a_file_that_is_no_run_is_refused(tmp_path):
    for text in ("", "{", "nothing\n"):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError):
            read_logged(tmp_path / "x.jsonl")
