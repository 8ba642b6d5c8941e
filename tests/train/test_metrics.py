"""Sinks: what was written can be read, once."""

from __future__ import annotations

import io
import json

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m1jax.train import metrics
from m1jax.train.metrics import ConsoleSink, JsonlSink, MetricSink, Sinks, TensorBoardSink, read_jsonl


def write_steps(sink: MetricSink, first: int, last: int, value: float) -> None:
    for step in range(first, last + 1):
        sink.write(step, {"reward/mean": np.float32(value)})
    sink.close()


def test_jsonl_rows_hold_step_time_and_plain_numbers(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    sink.write(3, {"a/b": np.float32(0.5), "a/n": np.int64(7), "a/bad": float("nan"), "a/inf": np.inf})
    text = (tmp_path / "deep" / "metrics.jsonl").read_text()  # before close: a reader sees every finished step
    sink.close()
    row = json.loads(text)
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "a/b": 0.5, "a/n": 7, "a/bad": None, "a/inf": None}
    assert text.endswith("}\n") and "NaN" not in text and isinstance(row["a/n"], int)


def test_a_resumed_run_leaves_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(JsonlSink(path, resume_step=0), 1, 5, 1.0)
    with path.open("a") as file:
        file.write('{"step": 6, "rewa')  # a kill cut this line
    write_steps(JsonlSink(path, resume_step=3), 4, 6, 2.0)
    assert [(row["step"], row["reward/mean"]) for row in read_jsonl(path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_reading_leaves_out_a_line_that_is_still_being_written(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2')
    assert read_jsonl(tmp_path / "m") == [{"step": 1}]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_steps(TensorBoardSink(tmp_path), 1, 5, 1.0)
    (first,) = tmp_path.iterdir()  # written earlier, as its name tells: of the same second, a counter sorts as text
    first.rename(first.with_name(f"events.out.tfevents.1000000000.{first.name.rsplit('.', 3)[1]}.1.0"))
    write_steps(TensorBoardSink(tmp_path, resume_step=3), 4, 6, 2.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_progress_line(monkeypatch):
    now = iter([100.0, 130.0, 160.0, 190.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    sink = ConsoleSink(total=120, first=10, stream=stream)
    sink.write(15, {"rollout/entropy": 0.25, "reward/mean": 0.5, "gradient/log10_-3": 1.0})
    sink.write(15, {"heldout/gcd/mean": 0.5})  # nothing to show: no line
    sink.write(20, {"reward/mean": 0.75, "time/tokens_per_second": 12345.6})
    sink.write(30, {"train/loss": 1.25})
    # 5 steps in 30 s leave 105 to do: 630 s. 10 in 60 s leave 100: 600 s; 20 in 90 s leave 90: 405 s.
    assert stream.getvalue().splitlines() == [
        " 15/120  reward 0.500  entropy 0.250  10:30 left",
        " 20/120  reward 0.750  12,346 tokens/s  10:00 left",
        " 30/120  loss 1.2500  6:45 left",
    ]


def test_sinks_fan_out(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    sink = Sinks([JsonlSink(path) for path in paths])
    assert isinstance(sink, MetricSink)
    write_steps(sink, 1, 2, 1.0)
    assert [[row["step"] for row in read_jsonl(path)] for path in paths] == [[1, 2], [1, 2]]
