"""Held-out accuracy of any model, with a config's tasks, tokenizer, sampling and verifiers; nothing is trained.

    python -m experiments.evaluate --model=runs/rl --config=configs/rl_tiny_cpu.py [--workdir=DIR]
                                   [--config.evaluation.problems=200] [--config.name=VALUE ...]

PATH is a run folder, one of its checkpoints/NUMBER, a Hugging Face folder, a .gguf file or "smollm2". The network is
the one found there; config.model says only how it is computed (dtype, remat, blocks). A run's checkpoint and its own
config give the numbers of that run's evaluation again. With --workdir, evaluation.json and evaluation_samples.md (the
first answers to each task) are written there; the folder may be the run's own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments import cli
from m1jax.config import build, to_dict
from m1jax.data.problems import majority_share
from m1jax.errors import UserError
from m1jax.model.config import ModelConfig
from m1jax.rl import engine_local
from m1jax.rl.evaluate import Answered, accuracy_by_task, evaluate, manner
from m1jax.rl.run import SAMPLES, check_heldout, local_engine, noise_seed, open_questions, open_scorer
from m1jax.rl.settings import RLConfig
from m1jax.sharding import check_rows, make_mesh, placed
from m1jax.train import report
from m1jax.train.pretrained import HOW_NOT_WHAT, Pretrained, differences, find_pretrained
from m1jax.types import ENDINGS

STORED = ("param_dtype", "init_std", "max_positions")
"""Of the fields that two configs of one network may differ in, those that the model's own config still decides."""


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    about = "run folder, checkpoint, Hugging Face folder, .gguf file or smollm2"
    parser.add_argument("--model", required=True, metavar="PATH", help=about)
    parser.add_argument("--workdir", default="", metavar="DIR", help="where evaluation.json and samples are written")
    arguments, values = cli.parse_with_config(parser, argv)
    folder = make_folder(arguments.workdir) if arguments.workdir else None
    model = find_pretrained(arguments.model)
    config = config_of(values, model)
    answers = answer_heldout(config, model)
    table = by_task(answers)
    for line in lines(table):
        print(line)
    if folder is not None:
        found = {"model": arguments.model, "step": model.meta.get("step"), "tasks": table, "config": to_dict(config)}
        report.write_json(folder / "evaluation.json", found)
        (folder / "evaluation_samples.md").write_text(samples(answers, f"Held-out answers of {arguments.model}"))
        print(f"written: {folder / 'evaluation.json'}, {folder / 'evaluation_samples.md'}")


def config_of(values: Mapping[str, Any], model: Pretrained, log: Callable[[str], None] = print) -> RLConfig:
    """The config of a file with the network of `model`, computed as the file says; `log` takes what is odd about it."""
    asked = build(ModelConfig, values.get("model", {}), "config.model")
    how = {name: getattr(asked, name) for name in HOW_NOT_WHAT if name not in STORED}
    network = dataclasses.replace(model.config, **how)
    config = build(RLConfig, {**values, "model": network, "init_from": str(model.path)})
    if differences(model.config, asked):
        log(f"config.model is another network; the one of {model.path} is evaluated")
    # A run keeps a copy of its tokenizer; the name it was given is in its config.
    named = model.meta.get("config", {}).get("tokenizer", {}).get("path")
    theirs, ours = model.tokenizer if named is None else named, config.tokenizer.path
    if theirs is not None and Path(theirs).resolve() != Path(ours).resolve():
        log(f"config.tokenizer.path is {ours or 'that of bytes'}; {model.path} names {theirs or 'that of bytes'}")
    return config


def answer_heldout(config: RLConfig, model: Pretrained) -> list[Answered]:
    """Every held-out prompt answered once and scored, with the noise of a run of this config.

    Raises:
        UserError: as the run would, before any weights are read where that is possible.
        NonFinite: the model's log-probabilities are not numbers.
    """
    mesh = make_mesh(config.mesh)
    check_rows(config.rollout.engine_rows, "config.rollout.engine_rows", mesh, engine_local.ROWS)
    check_heldout(config, model.meta)
    questions = open_questions(config)
    with open_scorer(config, questions) as scorer:
        engine = local_engine(config, questions, mesh)
        step = int(model.meta.get("step", 0))
        engine.set_weights(model.load(placed(mesh, engine.specs)), step)
        seed = noise_seed(jax.random.split(jax.random.key(config.seed))[1])  # the key that a run of it starts with
        score = partial(scorer.score_heldout, step)
        return evaluate(engine, questions.heldout, config.evaluation.sampling, seed, score)


def by_task(answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Per task: majority answer's share, accuracy {mean, low, high, n}, and the manner of the answers."""
    return {
        task: {
            "majority": majority_share([a.prompt.problem for a in answers if a.prompt.problem.task == task]),
            **report.accuracy(right, n),
            **manner([a for a in answers if a.prompt.problem.task == task]),
        }
        for task, (right, n) in accuracy_by_task(answers).items()
    }


def lines(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table for people."""
    rows = [["task", "n", "majority", "accuracy", "", "format", "tokens", *ENDINGS]]
    for task, row in table.items():
        rows.append(
            [task, f"{row['n']:,}", f"{row['majority']:.3f}", f"{row['mean']:.3f}",
             f"[{row['low']:.3f}, {row['high']:.3f}]", f"{row['format']:.3f}", f"{row['mean_length']:.1f}",
             *(f"{row['endings'][ending]:.3f}" for ending in ENDINGS)]
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def samples(answers: Sequence[Answered], title: str) -> str:
    """The first answers to each task, as Markdown; what others wrote is indented, so that it stays text."""
    parts = [f"# {title}"]
    for task in accuracy_by_task(answers):
        for answer in [a for a in answers if a.prompt.problem.task == task][:SAMPLES]:
            problem = answer.prompt.problem
            parts += [f"## {task}: {'right' if answer.correct else 'wrong'}", _indented(problem.question)]
            parts += [] if problem.answer is None else [f"Reference answer: `{problem.answer}`"]
            ended = f"ended by {answer.rollout.ending}" if answer.rollout.ending != "length" else "cut at max_tokens"
            parts += [f"Answer, {len(answer.rollout.token_ids)} tokens, {ended}:", _indented(answer.text)]
    return "\n\n".join(parts) + "\n"


def make_folder(name: str) -> Path:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: cannot be a folder ({error.strerror}); give another --workdir") from error
    return Path(name)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


if __name__ == "__main__":
    cli.exit_with(main, memory="config.rollout.engine_rows")
