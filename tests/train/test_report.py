"""The run folder: claimed once, read back whole, drawn from what is there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from m1jax.errors import UserError
from m1jax.train import curves
from m1jax.train.checkpoint import Checkpoints
from m1jax.train.metrics import JsonlSink
from m1jax.train.report import (
    Sample,
    accuracy,
    claim_run_folder,
    draw_curves,
    load_run,
    wilson_interval,
    write_json,
    write_samples,
)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    betas: tuple[float, float] = (0.9, 0.95)


def test_a_folder_is_claimed_then_resumed_then_refused(tmp_path):
    folder = tmp_path / "run"
    assert claim_run_folder(folder, Config()) is False
    assert json.loads((folder / "config.json").read_text()) == {"steps": 3, "betas": [0.9, 0.95]}
    assert claim_run_folder(folder, Config()) is True
    with pytest.raises(UserError) as caught:
        claim_run_folder(folder, Config(steps=4, betas=(0.9, 0.99)))
    line = str(caught.value)
    assert "steps was 3 and is 4, betas was [0.9, 0.95] and is [0.9, 0.99]" in line and "\n" not in line
    assert claim_run_folder(folder, Config()) is True, "a refusal changes nothing"


def test_a_file_in_the_way_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be a run folder .*; give another --workdir"):
            claim_run_folder(path, Config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        claim_run_folder(tmp_path, Config())


def test_load_run_gives_everything_back(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)
    claim_run_folder(tmp_path, Config())
    early = load_run(tmp_path)
    assert (early.metrics, early.summary) == ([], {}) and draw_curves(tmp_path) is False
    with pytest.raises(UserError, match="holds no checkpoint"):
        _ = early.params
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"reward/mean": 0.5})
    sink.close()
    write_json(tmp_path / "summary.json", {"heldout": {"gcd": {"after": accuracy(8, 10)}}})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"w": np.arange(3.0)}}, {"step": 1})
    assert draw_curves(tmp_path) and Image.open(tmp_path / "curves.png").size[0] > 0
    run = load_run(tmp_path)
    assert run.config["steps"] == 3 and run.metrics[0]["reward/mean"] == 0.5
    assert run.summary["heldout"]["gcd"]["after"]["mean"] == 0.8
    assert run.params["w"].tolist() == [0, 1, 2]


def test_write_json_never_leaves_half_a_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (1, 3), (410, 512)])
def test_wilson_interval_is_scipys(successes, n):
    reference = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_interval_by_hand():
    # z² = 3.8415, p = 1/2, n = 10: (0.5 + 0.19207 ± 1.95996 sqrt(0.025 + 0.0096036)) / 1.38415
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=5e-6)


def test_wilson_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p, n = 0.8, 200
    covered = [low <= p <= high for low, high in (wilson_interval(int(k), n) for k in rng.binomial(n, p, 4000))]
    assert 0.935 < np.mean(covered) < 0.965  # 0.95 within four standard errors and the lattice of n = 200
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert accuracy(0, 0) == {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_wilson_interval_holds_its_proportion_exactly_and_is_closed_at_none_and_all():
    """A bound beyond the mean by one rounding would be an error bar of negative length."""
    for n in range(1, 1000):
        for k in {0, 1, n // 2, n - 1, n}:
            low, high = wilson_interval(k, n)
            assert 0 <= low <= k / n <= high <= 1, (k, n)
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1


def test_samples_show_what_was_written_and_cannot_break_the_page(tmp_path):
    sample = Sample("gcd", "What is gcd(4, 6)?", "2", "I guess\n```\n# not a heading", 0.0, "<answer>2</answer>", 1.0)
    write_samples(tmp_path / "samples.md", [sample, dataclasses.replace(sample, answer=None)])
    text = (tmp_path / "samples.md").read_text()
    assert text.count("## ") == 2 and text.count("Reference answer: `2`") == 1
    assert "````text\nI guess\n```\n# not a heading\n````" in text
    assert text.index("Before, score 0:") < text.index("After, score 1:")


def test_curves_are_drawn_from_what_is_there(tmp_path):
    path = tmp_path / "curves.png"
    assert (
        curves.draw_curves(path, []) is False and curves.draw_curves(path, [{"step": 1, "reward/mean": None}]) is False
    )
    assert not path.exists()
    rows = [{"step": step, "time": 1.0, "reward/mean": step / 60, "rollout/entropy": None} for step in range(60)]
    assert curves.draw_curves(path, rows) is True
    one = Image.open(path).size
    for step in (0, 30):
        rows[step] |= {f"heldout/gcd/{key}": value for key, value in accuracy(step, 60).items()}
    rows[5] |= {"train/grad_norm": 0.0, "rollout/share_stop": 1}
    assert curves.draw_curves(path, rows, title="a run") is True
    four = Image.open(path).size
    assert four[0] == 3 * one[0] and four[1] > 2 * one[1], "held-out, endings and gradient norm have panels now"
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_curves_carry_the_error_bars(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, yerr, **_: drawn.append((x, y, yerr)))
    rows = [{"step": 7, "heldout/gcd/mean": 0.5, "heldout/gcd/low": 0.4, "heldout/gcd/high": 0.7}]
    curves.draw_curves(tmp_path / "curves.png", rows)
    [(x, y, [below, above])] = drawn
    assert (x, y) == ([7], [0.5]) and below == pytest.approx([0.1]) and above == pytest.approx([0.2])


@pytest.mark.parametrize("title", ["", "a run"])
def test_panels_and_what_is_written_around_them_have_room(tmp_path, monkeypatch, title):
    """Alone on the page, in a row, and all of them, with numbers as long as they come."""
    from matplotlib.figure import Figure

    from m1jax.train import curves

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    names = [panel.patterns[0].replace("*", "sums") for panel in curves.PANELS]
    for count in (1, 3, len(names)):
        rows = [{"step": step, **dict.fromkeys(names[:count], -0.02345 * step)} for step in (1, 2000)]
        assert curves.draw_curves(tmp_path / "curves.png", rows, title)
        figure = drawn.pop()
        page, boxes = figure.bbox, [axes.get_tightbbox() for axes in figure.axes]
        assert len(boxes) == count
        if title:
            boxes.append(figure._suptitle.get_window_extent())
        for i, box in enumerate(boxes):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
