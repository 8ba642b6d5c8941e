"""What a rollout server costs the trainer: the client's CPU, the sync of weights, and what asking ahead saves.

    launch/sglang.sh FOLDER 30000
    python -m experiments.bench.servers client --urls=http://127.0.0.1:30000 --model=FOLDER [--requests=256]
                                               [--tokens=200]
    python -m experiments.bench.servers sync --urls=http://127.0.0.1:30000 --model=FOLDER [--rounds=5]
                                             [--dtype=bfloat16]
    python -m experiments.bench.servers staleness --urls=http://127.0.0.1:30000 --config=configs/rl_tiny_sglang.py
                                                  --init_from=RUN [--steps=8 --rounds=3] [--config.key=value ...]

client      so many requests at once, streamed and in segments: CPU seconds of the client's thread by those of the wall
sync        weights to disk, the servers' reading of them, both checksums; the weights differ every time
staleness   the same run with a bound of 0 and of 1, in turn: seconds from record to record after the second step

FOLDER is what the server was started with, in the form that it reads; RUN a run of the same model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo, before JAX starts

import jax
import numpy as np

from experiments import cli
from m1jax.config import build
from m1jax.rl.engine_sglang import SGLangEngine
from m1jax.rl.loop import train
from m1jax.rl.servers.settings import ServersConfig
from m1jax.rl.settings import RLConfig
from m1jax.train.pretrained import Pretrained, find_pretrained
from m1jax.types import Problem, Prompt, Sampling
from m1jax.weights.hf_folder import CONFIG, GENERATION, read_json


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = parser.add_subparsers(dest="measure", required=True)
    for name in ("client", "sync", "staleness"):
        measure = measures.add_parser(name)
        measure.add_argument("--urls", required=True, help="of the servers, with commas between them")
        measure.add_argument("--rounds", type=int, default=3)
        if name == "staleness":
            measure.add_argument("--init_from", required=True)
            measure.add_argument("--steps", type=int, default=8)
            continue
        measure.add_argument("--model", required=True, help="folder that the servers were started with")
        measure.add_argument("--dtype", default="", help="of the weights on disk; that of the folder by default")
        measure.add_argument("--requests", type=int, default=256)
        measure.add_argument("--tokens", type=int, default=200)
    overrides = [word for word in argv if word.startswith("--config")]
    arguments = parser.parse_args([word for word in argv if word not in overrides])
    if arguments.measure == "staleness":
        _, values = cli.parse_with_config(cli.Parser(), overrides)
        staleness(arguments, values)
    else:
        {"client": client, "sync": sync}[arguments.measure](arguments)


def client(arguments: argparse.Namespace) -> None:
    """Print CPU time and bytes of the client for requests that are all under way at once."""
    model = find_pretrained(arguments.model)
    params = model.load()
    for repetition_stop in ("stream", "segments"):
        shares, rates, costs, volumes = [], [], [], []
        with open_engine(arguments, model, repetition_stop=repetition_stop) as engine:
            engine.set_weights(params, 0)
            for round_ in range(arguments.rounds):
                engine.take_metrics()
                prompts = [made_up_prompt(model, round_ * arguments.requests + i) for i in range(arguments.requests)]
                start = os.times().elapsed
                groups = engine.generate(prompts, 1, Sampling(arguments.tokens, repetition_run=3000), 0)
                seconds, metrics = os.times().elapsed - start, engine.take_metrics()
                tokens = sum(len(r.token_ids) for group in groups for r in group)
                shares.append(metrics["engine/client_cpu"] / seconds)
                rates.append(tokens / seconds)
                costs.append(metrics["engine/client_cpu"] / tokens * 1e6)
                volumes.append(metrics["engine/bytes"] / tokens)
        print(
            f"{repetition_stop:<10}{arguments.requests} requests, {median(rates):6.0f} tokens/s: client CPU "
            f"{median(shares):.1%} of the wall, {median(costs):.1f} us and {median(volumes):.0f} bytes a token"
        )


def sync(arguments: argparse.Namespace) -> None:
    """Print what the sync of a model takes, part by part."""
    model = find_pretrained(arguments.model)
    params = model.load()
    bump = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 1.001, tree))
    rows = []
    with open_engine(arguments, model, weights_dtype=arguments.dtype) as engine:
        for version in range(arguments.rounds + 1):  # the first update comes with the probes
            engine.set_weights(params, version)
            rows.append(engine.take_metrics())
            params = jax.block_until_ready(bump(params))
    seconds, write = (median(row[f"sync/{name}"] for row in rows[1:]) for name in ("seconds", "write_seconds"))
    print(
        f"sync of {rows[0]['sync/bytes'] / 2**20:.0f} MiB: {seconds:.2f} s, of which {write:.2f} s to disk; "
        f"fastest {min(row['sync/seconds'] for row in rows[1:]):.2f} s of {arguments.rounds}"
    )


def staleness(arguments: argparse.Namespace, values: dict) -> None:
    """Print seconds a step for a bound of 0 and of 1."""
    values["init_from"], values["steps"] = arguments.init_from, arguments.steps
    values["servers"] = (values.get("servers") or {}) | {"urls": tuple(arguments.urls.split(","))}
    values["evaluation"] |= {"every": 10 * arguments.steps}
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for round_ in range(arguments.rounds):
        for bound, found in seconds.items():
            values["rollout"]["staleness"] = bound
            with tempfile.TemporaryDirectory() as folder:
                config = build(RLConfig, values | {"seed": round_})
                rows = train(config, Path(folder) / "run", log=lambda line: None).metrics
            # The last step has an evaluation with it, the first two compile.
            found += np.diff([row["time"] for row in rows[2:-1]]).tolist()
    for bound, found in seconds.items():
        print(f"staleness {bound}: {median(found):.2f} s a step [{min(found):.2f}, {max(found):.2f}], n = {len(found)}")
    print(f"ratio 0 / 1: {median(seconds[0]) / median(seconds[1]):.2f}")


@contextmanager
def open_engine(arguments: argparse.Namespace, model: Pretrained, **config) -> Iterator[SGLangEngine]:
    """An engine over the servers that were asked for; weights go through a temporary folder."""
    servers = ServersConfig(urls=tuple(arguments.urls.split(",")), **config)
    with tempfile.TemporaryDirectory(prefix="m1jax-weights-") as folder:
        engine = SGLangEngine(
            servers, model.config, stop_ids=stop_ids(Path(arguments.model)), temperature=1.0,
            positions=64 + arguments.tokens, weights=Path(folder), log=lambda line: None,
        )  # fmt: skip
        try:
            yield engine
        finally:
            engine.close()


def stop_ids(folder: Path) -> list[int]:
    """Where the server stops by itself, by the files of its folder."""
    found: set[int] = set()
    for name in (CONFIG, GENERATION):
        eos = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(found)


def made_up_prompt(model: Pretrained, index: int) -> Prompt:
    """Sixteen random ids."""
    ids = np.random.default_rng(index).integers(3, model.config.vocab_size - 1, 16)
    return Prompt(index, Problem("bench", "", None), tuple(ids.tolist()))


if __name__ == "__main__":
    import sys

    cli.exit_with(lambda _: main(sys.argv[1:]), memory="--requests or --tokens")
