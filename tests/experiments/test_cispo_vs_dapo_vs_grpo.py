"""The study of CISPO, DAPO and GRPO: its measure by hand, tables and notebook, and the results that are committed."""

import ast
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from experiments import cli
from experiments.cispo_vs_dapo_vs_grpo import figures, results, run, table
from experiments.cispo_vs_dapo_vs_grpo.results import ALGORITHMS, RESULTS, LoggedRun
from m1jax.errors import UserError

ROOT = Path(__file__).parents[2]
NOTEBOOK = Path(results.__file__).with_name("ablation.ipynb")
NEVER = float("inf")

# Nine evaluations, steps 0 to 8. DAPO's final score is 0.3; its means of three are 0, .1, .2, .3 at steps 2 to 5.
DAPO = [0, 0, 0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
CISPO = [0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6]  # means 0.2, 0.3 at steps 2 and 3: there at 3
GRPO = [0, 0, 0, 0, 0, 0, 0, 0, 0.3]
CURVES = {"cispo": CISPO, "dapo": DAPO, "grpo": GRPO}


def made(task="count_bits", algorithm="dapo", seed=0, accuracy=DAPO, rate=1e-4, **metrics) -> Any:
    """A run as `run.keep` writes it, with further metrics the same at every step from 1 on."""
    about = {"phase": "study", "task": task, "algorithm": algorithm, "seed": seed, "learning_rate": rate}
    about |= {"cpu_seconds": 100.0 + seed % 100, "config": {"steps": len(accuracy) - 1}}
    rows = [{"step": i, f"heldout/{task}/mean": x, "time/cpu": 10.0} for i, x in enumerate(accuracy)]
    for row in rows[1:]:
        row |= {"rollout/tokens": 1000.0, **metrics}
    return LoggedRun(about, rows)


def write(path: Path, run: LoggedRun) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in [run.about, *run.rows]))


def write_tuning(folder: Path, best: float = 2e-4) -> None:
    """All rates and seeds; `best` ends 0.1 above the others everywhere."""
    for t, a, s, r in itertools.product(run.TASKS, ALGORITHMS, run.TUNING_SEEDS, run.RATES):
        accuracy = np.array(CURVES[a]) + 0.1 * (r == best)
        write(folder / "tune" / f"{t}_{a}_lr{r:g}_seed{s}.jsonl", made(t, a, s, list(accuracy), r))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Tuning, and a study of two tasks and two seeds."""
    write_tuning(tmp_path)
    for t, a, s in itertools.product(run.TASKS, ALGORITHMS, (0, 1)):
        extra = {"ratio/capped_share_positive": 0.001 * (a == "cispo"), "rollout/length_mean": 20.0 + s}
        write(tmp_path / "study" / f"{t}_{a}_seed{s}.jsonl", made(t, a, s, CURVES[a], 2e-4, **extra))
    return tmp_path


# -- the measure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "steps"),
    [
        (0.2, 3.5),  # half way from 0.1 at step 3 to 0.3 at step 4
        (0.3, 4.0),
        (0.15, 3.25),
        (0.6, 5.0),
        (0.61, NEVER),
        (0.0, 2.0),  # there from the first mean of three on, that of steps 0 to 2
        (-1.0, 2.0),
    ],
)
def test_steps_to_by_hand(threshold, steps):
    accuracy = np.array([0, 0, 0, 0.3, 0.6, 0.9])  # means of three: 0, 0.1, 0.3, 0.6 at steps 2 to 5
    assert results.steps_to(accuracy, threshold) == pytest.approx(steps)


def test_steps_to_takes_the_first_time_and_ties_count():
    assert results.steps_to(np.array([0.6, 0.6, 0.6, 0, 0, 0, 0.9, 0.9, 0.9]), 0.6) == 2
    assert results.steps_to(np.array([0, 0, 0.6, 0.6, 0.6, 0, 0, 0]), 0.4) == pytest.approx(3)
    assert results.steps_to(np.full(9, 0.7), float(np.full(4, 0.7).mean())) == 2  # whatever the last bit says
    assert results.steps_to(np.full(9, 0.33333), 0.333335) == 2  # five digits were kept
    assert results.steps_to(np.full(9, 0.3333), 0.3334) == NEVER


def test_final_score_is_the_mean_of_the_last_four():
    assert made(accuracy=[1, 1, 1, 0.1, 0.2, 0.3, 0.6]).final == pytest.approx(0.3)


def test_ratio_at_a_part_of_the_gain():
    """From 0.1 to the final 0.5, half of the gain is 0.3: trailing means of 3 pass it at 3.5 and, one later, at 4.5."""
    theirs = [0.1, 0.1, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5]
    runs = [made(algorithm="dapo", accuracy=theirs), made(algorithm="cispo", accuracy=[0.1, *theirs[:-1]])]
    (pair,) = results.ratios(runs, "cispo", "dapo", share=0.5)
    assert pair["threshold"] == pytest.approx(0.3)
    # Means up to step 4: (0.1 + 0.2 + 0.4) / 3 = 0.2333; up to step 5: 1.1 / 3 = 0.3667: half-way between.
    assert (pair["theirs"], pair["ours"]) == pytest.approx((4.5, 5.5)) and pair["ratio"] == pytest.approx(5.5 / 4.5)


def test_ratios_pair_task_and_seed():
    late = [0, *DAPO[:-1]]  # one step later, and its final score is 0.3 as well
    runs = [
        made(algorithm="cispo", seed=1, accuracy=CISPO), made(algorithm="dapo", seed=1),
        made(algorithm="cispo", seed=0, accuracy=CISPO), made(algorithm="dapo", seed=0, accuracy=late),
        made("basic_arithmetic", "cispo", 0, GRPO), made("basic_arithmetic", "dapo", 0),
        made(algorithm="cispo", seed=7, accuracy=CISPO),  # without its DAPO
    ]  # fmt: skip
    found = results.ratios(runs, "cispo", "dapo")
    assert [(p["task"], p["seed"]) for p in found] == [("basic_arithmetic", 0), ("count_bits", 0), ("count_bits", 1)]
    assert [p["theirs"] for p in found] == pytest.approx([5, 6, 5])
    assert [p["ours"] for p in found] == pytest.approx([NEVER, 3, 3])  # censored: kept as infinite
    assert [p["ratio"] for p in found] == pytest.approx([NEVER, 3 / 6, 3 / 5])
    assert [p["ratio_to_all"] for p in found] == pytest.approx([NEVER, 3 / 8, 3 / 8])
    assert [p["threshold"] for p in found] == pytest.approx([0.3] * 3)
    assert results.ratios(runs, "cispo", "dapo", "basic_arithmetic") == found[:1]
    differences = results.final_differences(runs, "cispo", "dapo")
    np.testing.assert_allclose(differences, [0.075 - 0.3, 0.3, 0.3])


def test_a_reference_that_misses_its_own_final_score_counts_as_all_its_steps():
    dip = [0, 0, 0, 0, 0, 0.8, 0.6, 0.6, 0.8]  # final 0.7; the last means of three are 2/3
    runs = [
        made(accuracy=dip),
        made(algorithm="cispo", accuracy=[0, *[0.7] * 8]),
        made(algorithm="grpo", accuracy=GRPO),
    ]
    (pair,) = results.ratios(runs, "cispo", "dapo")
    assert pair["theirs"] == NEVER and pair["ratio"] == pytest.approx(3 / 8)
    (pair,) = results.ratios(runs, "grpo", "dapo")
    assert pair["ratio"] == NEVER


def test_median_keeps_infinite_values():
    assert results.median_with_interval([0.5]) == (0.5, 0.5, 0.5)
    assert results.median_with_interval([1, NEVER])[0] == NEVER
    assert results.median_with_interval([1, 3, NEVER])[0] == 3
    assert results.median_with_interval([NEVER] * 3) == (NEVER, NEVER, NEVER)
    # The median of ten draws is infinite where five or more are: probability 0.0016 for one of ten, 0.033 for two.
    assert results.median_with_interval([0.5] * 9 + [NEVER]) == (0.5, 0.5, 0.5)
    assert results.median_with_interval([0.5] * 8 + [NEVER] * 2) == (0.5, 0.5, NEVER)


def test_intervals_are_percentiles_of_the_bootstrap():
    values = np.array([0.3, 0.5, 0.55, 0.7, 0.9, 1.2, 1.3])
    for ours, statistic in ((results.median_with_interval, np.median), (results.mean_with_interval, np.mean)):
        theirs = scipy.stats.bootstrap((values,), statistic, n_resamples=10_000, method="percentile", rng=1)
        middle, low, high = ours(values)
        assert middle == pytest.approx(statistic(values))
        assert low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
        assert high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.4, 0.9, True), (0.5, 0.5, True), (0.4, 1.0, False), (0.6, 0.9, False), (0.1, 0.4, False), (0.4, NEVER, False)],
)
def test_the_claim_holds_below_one_and_around_a_half(low, high, expected):
    assert results.holds(low, high) is expected


def test_best_rates_by_mean_over_seeds():
    def scored(rate, seed, final):
        return made(seed=seed, rate=rate, accuracy=[0] * 5 + [final] * 4)

    runs = [scored(1e-4, 100, 0.5), scored(1e-4, 101, 0.7), scored(2e-4, 100, 0.9), scored(2e-4, 101, 0.2)]
    assert results.best_rates(runs) == {("count_bits", "dapo"): 1e-4}
    tie = [scored(4e-4, 100, 0.3), scored(4e-4, 101, 0.1), scored(2e-4, 100, 0.1), scored(2e-4, 101, 0.3)]
    assert results.best_rates(tie) == {("count_bits", "dapo"): 2e-4}
    assert results.best_rates([]) == {}
    with pytest.raises(UserError, match="count_bits cispo was not tuned at rate 0.0001, seed 101; .*--phase=tune"):
        results.best_rates([*runs, made(algorithm="cispo", seed=100)])


def test_curves_against_what_was_spent():
    one, other = made(accuracy=[0, 0.2, 0.4]), made(seed=1, accuracy=[0, 0.4, 0.8])
    other.rows[2]["rollout/tokens"] = 3000.0
    assert list(other.spent("rollout/tokens")) == [0, 1000, 4000]
    places, mean, low, high = results.bands_against([one, other], "rollout/tokens")
    assert places[0] == 0 and places[-1] == 2000  # as far as both went
    assert mean[-1] == pytest.approx((0.4 + 0.4 + 0.4 / 3) / 2)
    assert low[-1] == pytest.approx(0.4) and high[-1] == pytest.approx(0.4 + 0.4 / 3)


def test_bands_take_the_steps_that_all_runs_have():
    one, other = made(a=1.0, b=2.0), made(seed=1, a=3.0, b=4.0)
    del one.rows[3]["a"]
    steps, mean, low, high = results.bands([one, other], ["a", "b"])
    assert list(steps) == [1, 2, 4, 5, 6, 7, 8]
    assert set(mean) == {5.0} and set(low) == {3.0} and set(high) == {7.0}
    assert not results.bands([one, other], ["absent"])[0].size


def test_one_number_of_a_metric():
    run = made(accuracy=[0] * 7)
    for row, value in zip(run.rows[1:], (4.0, 8.0, 1.0, 2.0, 3.0, 6.0), strict=True):
        row["x"] = value
    expected = {"mean": 4, "first": 4, "last": 3, "largest": 8, "total": 24, "lowest share of first": 0.25}
    assert {how: run.reduced("x", how) for how in results.REDUCE} == expected
    assert math.isnan(run.reduced("absent", "mean"))


# -- the order of the runs ---------------------------------------------------------------------------------------


def test_jobs_of_the_tuning(tmp_path):
    jobs = run.jobs("tune", tmp_path, smoke=False)
    assert len(jobs) == len({job.name for job in jobs}) == len(run.TUNING_SEEDS) * 3 * 6
    assert [job.seed for job in jobs] == [seed for seed in run.TUNING_SEEDS for _ in range(18)]
    assert not set(run.TUNING_SEEDS) & set(run.SEEDS)
    assert {(j.task, j.algorithm) for j in jobs[:6]} == set(itertools.product(run.TASKS, ALGORITHMS))
    assert len({j.learning_rate for j in jobs[:6]}) == 1  # a rate is complete before the next one starts
    assert jobs[0].name == "count_bits_cispo_lr0.0001_seed100"
    assert len(run.jobs("tune", tmp_path, smoke=True)) == 6


def test_jobs_of_the_study_come_in_pairs_with_the_rates_that_won(folder):
    jobs = run.jobs("study", folder, smoke=False)
    assert [job.seed for job in jobs] == [seed for seed in range(5) for _ in range(6)]
    assert [job.algorithm for job in jobs[:6]] == [*ALGORITHMS, *ALGORITHMS]
    assert {job.learning_rate for job in jobs} == {2e-4}
    assert jobs[0].name == "count_bits_cispo_seed0"
    command = jobs[1].command(Path("base"), Path("there"), smoke=True)
    assert "--config.loss=dapo" in command and "--config=configs/zero_rl_tiny_cpu.py:smoke" in command
    assert len(run.jobs("study", folder, smoke=True)) == 6


def test_no_study_before_the_tuning(tmp_path):
    with pytest.raises(
        UserError, match="tune: 18 runs are missing, count_bits_cispo_lr0.0001_seed100 the first; .*tune first"
    ):
        run.jobs("study", tmp_path, smoke=False)
    write_tuning(tmp_path)
    for path in (tmp_path / "tune").glob("*_grpo_lr0.0004_*.jsonl"):
        path.unlink()
    with pytest.raises(UserError, match="tune: 2 runs are missing, count_bits_grpo_lr0.0004_seed100 the first"):
        run.jobs("study", tmp_path, smoke=False)


# -- the tables --------------------------------------------------------------------------------------------------


def test_table_by_hand(folder, capsys):
    assert cli.guard(lambda: table.main([f"--results={folder}"]), uses_jax=False) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"| count_bits | DAPO | {len(run.TUNING_SEEDS)} | 0.300 | **0.400** | 0.300 |",
        "| count_bits | 2 | 0.000 | 0.600 | 0.300 | 0.075 |",
        "| all | +0.300 | -0.225 |",
        "| CISPO / DAPO | all | 4 | 0.60 | 0 | 0 | 0.38 |",
        "| GRPO / DAPO | count_bits | 2 | ∞ | 2 | 0 | ∞ |",
        "The claim of the paper, a ratio of 0.5, does not hold here: "
        "the interval over all pairs lies below 1 and does not contain 0.5.",
        "| count_bits | 1 | 0.300 | 3.00 | 5.00 | ∞ | 0.60 | ∞ |",
        "| count_bits | capped, advantage > 0 | 0.001 | 0 | 0 |",
        "| count_bits | p < 0.1 with a gradient, updates 2 to 16 | – | – | – |",
        "| count_bits | length, step 1 | 20.5 [20, 21] | 20.5 [20, 21] | 20.5 [20, 21] |",
        "| count_bits | generated tokens of a run | 8,000 | 8,000 | 8,000 |",
        "| count_bits | CPU seconds of a run: median, largest | 100, 101 | 100, 101 | 100, 101 |",
        f"Largest of all {12 + 18 * len(run.TUNING_SEEDS)} runs, tuning included: 101.0 CPU seconds "
        "(within the bound of 180).",
    ):
        assert line in lines
    assert not any("edge of the grid" in line for line in lines)


def test_a_rate_at_the_edge_of_the_grid_is_told(tmp_path):
    write_tuning(tmp_path, best=4e-4)
    text = table.tuning_table(results.load(tmp_path / "tune"))
    assert f"| basic_arithmetic | CISPO | {len(run.TUNING_SEEDS)} | 0.600 | 0.600 | **0.700** |" in text
    assert (
        "Chosen at the edge of the grid: basic_arithmetic CISPO, basic_arithmetic DAPO, basic_arithmetic GRPO," in text
    )


def test_figure(folder, tmp_path, capsys):
    path = tmp_path / "overview.png"
    table.main([f"--results={folder}", f"--figure={path}"])
    assert path.read_bytes().startswith(b"\x89PNG") and not path.with_name("overview.png.new").exists()
    assert capsys.readouterr().out


@pytest.mark.parametrize("chosen", [figures.MECHANISM, figures.POLICY, figures.FAILURES])
def test_panels_say_what_was_not_recorded(chosen):
    runs = [made(algorithm=a, seed=s, accuracy=CURVES[a]) for a in ALGORITHMS for s in (0, 1)]
    names = {name for panel in chosen for metrics in panel.curves.values() for name in metrics}
    for recorded in (False, True):
        if recorded:
            runs = [
                LoggedRun(r.about, [{**row, **dict.fromkeys(names, 0.5 + r.cell[1])} for row in r.rows]) for r in runs
            ]
        places = figures.panels(runs, chosen).axes
        said = [text.get_text() for axes in places for text in axes.texts]
        assert len(places) == len(chosen) and said == [figures.MISSING] * len(chosen) * (not recorded)
        assert recorded == all(axes.lines for axes in places)


def test_results_keep_what_the_table_names():
    assert not [measure.metric for measure in table.MEASURES if not measure.metric.startswith(run.KEPT)]


def _remove_one(folder: Path) -> None:
    (folder / "study" / "count_bits_grpo_seed1.jsonl").unlink()


def _cut(folder: Path) -> None:
    path = folder / "study" / "count_bits_grpo_seed1.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _break(folder: Path) -> None:
    (folder / "study" / "count_bits_grpo_seed1.jsonl").write_text("{")


def _remove_study(folder: Path) -> None:
    for path in (folder / "study").iterdir():
        path.unlink()


def _remove_tuning(folder: Path) -> None:
    for path in (folder / "tune").iterdir():
        path.unlink()


def _other_rate(folder: Path) -> None:
    write(folder / "study" / "count_bits_grpo_seed1.jsonl", made("count_bits", "grpo", 1, GRPO, 4e-4))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (_remove_one, "study: 0 results of count_bits, seed 1, grpo, expected one; run python -m"),
        (_cut, "grpo_seed1.jsonl: does not hold evaluations of steps 0 to 8; delete it and run it again"),
        (_break, "grpo_seed1.jsonl: not a result of this study; delete it and run it again"),
        (_remove_study, "study: no results; run python -m experiments.cispo_vs_dapo_vs_grpo.run first"),
        (_remove_tuning, "tune: no results of basic_arithmetic, cispo; run with --phase=tune first"),
        (_other_rate, "count_bits, seed 1, grpo ran at rate 0.0004, but the tuning gives 0.0002; delete it"),
    ],
)
def test_one_line_about_what_is_missing(folder, capsys, spoil, line):
    spoil(folder)
    assert cli.guard(lambda: table.main([f"--results={folder}"]), uses_jax=False) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and not captured.out


# -- the notebook, and what is committed -------------------------------------------------------------------------


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_defines_nothing_and_is_small():
    for cell in cells():
        if cell["cell_type"] == "code":
            code = "".join(line for line in cell["source"] if not line.startswith("%"))
            defined = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.AsyncFunctionDef)
            assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(code)))
    assert NOTEBOOK.stat().st_size < 1_000_000


needs_results = pytest.mark.skipif(not (RESULTS / "study").is_dir(), reason="no results are committed")


@needs_results
@pytest.mark.parametrize("phase", ["tune", "study"])
def test_committed_results_are_complete(phase):
    jobs = {job.name: job for job in run.jobs(phase, RESULTS, smoke=False)}
    assert {path.stem for path in (RESULTS / phase).iterdir()} == set(jobs)
    for logged in results.load(RESULTS / phase):
        job = next(j for j in jobs.values() if all(logged.about[k] == v for k, v in vars(j).items()))
        assert logged.about["config"]["seed"] == job.seed
        assert logged.about["config"]["optimizer"]["learning_rate"] == job.learning_rate
        assert logged.about["config"]["steps"] == 16 and logged.about["config"]["update"]["updates_per_batch"] == 16
        assert logged.about["cpu_seconds"] <= results.CPU_LIMIT, job.name
        if phase == "study":
            names = {name for row in logged.rows for name in row}
            assert {measure.metric for measure in table.MEASURES} | {"time/cpu"} <= names, job.name


@needs_results
def test_the_readme_states_what_the_table_computes():
    computed = set(table.page(RESULTS).splitlines())
    stated = [line for line in NOTEBOOK.with_name("README.md").read_text().splitlines() if line.startswith("|")]
    assert not [line for line in stated if line not in computed]


@needs_results
def test_the_notebook_holds_the_figures_of_the_committed_results():
    outputs = [output for cell in cells() for output in cell.get("outputs", [])]
    shown = [output["data"] for output in outputs if "data" in output]
    assert len(shown) == len(outputs) and sum("image/png" in data for data in shown) == 5
    runs = results.load(RESULTS / "study")
    texts = ["".join(data["text/markdown"]) for data in shown if "text/markdown" in data]
    failures = table.measures_table(runs, table.FAILURES)
    assert texts == [table.ratio_table(runs), table.finals_table(runs), failures]


# -- all of it, at its smallest ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_smoke_from_tuning_to_notebook(tmp_path, monkeypatch, capsys):
    import nbclient
    import nbformat

    command = [sys.executable, "-m", "experiments.cispo_vs_dapo_vs_grpo.run", "--smoke", f"--workdir={tmp_path}"]
    for phase in ("tune", "study"):
        subprocess.run([*command, f"--phase={phase}"], cwd=ROOT, check=True)
    folder = tmp_path / "results"
    files = sorted(folder.glob("*/*.jsonl"))
    written = [path.stat().st_mtime_ns for path in files]
    subprocess.run([*command, "--phase=study"], cwd=ROOT, check=True)  # again: everything is there already
    assert len(files) == 12 and [path.stat().st_mtime_ns for path in files] == written

    table.main([f"--results={folder}", f"--figure={tmp_path / 'results.png'}"])
    assert "| CISPO / DAPO | all | 2 |" in capsys.readouterr().out and (tmp_path / "results.png").exists()
    names = {name for row in results.load(folder / "study")[0].rows for name in row}
    # A base model of three updates gets nothing right, so that no group is live and there is no update to tell of.
    of_rollouts = {measure.metric for measure in table.MEASURES if measure.metric.startswith("rollout/")}
    assert of_rollouts - names <= {"rollout/length_correct"} and "time/cpu" in names

    monkeypatch.setenv("M1JAX_RESULTS", str(folder))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 5
