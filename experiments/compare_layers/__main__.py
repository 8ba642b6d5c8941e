"""Where two ways of computing one model part, layer by layer.

    python -m experiments.compare_layers --hf=FOLDER                              # two modes of one model
    python -m experiments.compare_layers --hf=FOLDER --goldens=FOLDER/goldens.npz # against recorded numbers
    python -m experiments.compare_layers --random=proxy_100m --head_gain=3000     # a model with a loud head, no weights

`--hf` takes a Hugging Face folder, a .gguf file, a run folder or a checkpoint. Without goldens: the training forward
against step decode, and bfloat16 against float32, each with a bfloat16 and a float32 head. With goldens: every array
of the file (its format stands in goldens.py); the exit code is 1 where one is off, 2 where nothing could be checked.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import cli
from m1jax.errors import UserError

OFF = 1
"""Exit code where a number is beyond its tolerance."""
SAMPLED = {"rows": 2, "tokens": 128, "seed": 0, "head_gain": 1.0}
"""What two modes of one model are compared on, where nothing else is said."""


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--hf", default="", metavar="PATH")
    parser.add_argument("--goldens", default="", metavar="FILE.npz")
    parser.add_argument("--gradients", default="", metavar="FILE", help="[grads/grads.safetensors beside the goldens]")
    parser.add_argument("--random", default="", metavar="NAME", help="random weights of a model of configs/models.py")
    parser.add_argument("--head_gain", type=float, help="make one channel of the head's input so much louder [1]")
    parser.add_argument("--rows", type=int, help="sequences [2]")
    parser.add_argument("--tokens", type=int, help="tokens of each, sampled by the model itself [128]")
    parser.add_argument("--seed", type=int, help="of random weights and of the tokens [0]")
    parser.add_argument("--out", default="runs/compare_layers.png", metavar="FILE.png")
    arguments = parser.parse_args(argv)
    if bool(arguments.hf) == bool(arguments.random):
        raise UserError("give --hf=PATH, or --random=NAME for random weights")
    if arguments.goldens and arguments.random:
        raise UserError("--goldens: recorded numbers need the weights that made them; give --hf=PATH")
    if arguments.gradients and not arguments.goldens:
        raise UserError("--gradients: they belong to recorded numbers; give --goldens=FILE.npz too")
    for name, default in SAMPLED.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif arguments.goldens:
            raise UserError(
                f"--{name}: is of two modes of one model, recorded numbers have their own tokens; leave it out"
            )
    if arguments.tokens < 2 or arguments.rows < 1:
        raise UserError(f"--rows={arguments.rows} --tokens={arguments.tokens}: at least 1 row of 2 tokens")
    if not 0 <= arguments.seed < 2**31:
        raise UserError(f"--seed={arguments.seed}: expected a number from 0 to {2**31 - 1}")
    if not np.isfinite(arguments.head_gain):
        raise UserError(f"--head_gain={arguments.head_gain}: expected a finite number")
    from experiments.compare_layers.draw import require_writable

    require_writable(arguments.out)
    if arguments.goldens:
        against_goldens(arguments)
    else:
        between_modes(arguments)


def against_goldens(arguments: argparse.Namespace) -> None:
    import jax

    # Ours in float64: see goldens.py.
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    from experiments.compare_layers.draw import draw_checks
    from experiments.compare_layers.goldens import check_goldens, unchecked
    from experiments.compare_layers.recorded import read_arrays, require_gradients, require_shapes
    from m1jax.train.pretrained import find_pretrained

    file = Path(arguments.goldens)
    arrays = read_arrays(file)
    gradients = Path(arguments.gradients) if arguments.gradients else file.parent / "grads" / "grads.safetensors"
    if arguments.gradients and not gradients.is_file():
        raise UserError(f"{gradients}: no such file")
    model = find_pretrained(arguments.hf, "float64")
    require_shapes(arrays, model.config, file)
    print(f"{arguments.hf}: {model.config.num_layers} layers; {file}: {len(arrays)} arrays")
    gradient_file = gradients if gradients.is_file() else None
    if gradient_file and "grad_input_ids" in arrays:
        require_gradients(gradient_file, model.config)
    checks, empty = [], []
    for batch in check_goldens(model.load(), model.config, arrays, gradient_file):
        done = [check for check in batch if check.compared]
        nothing = [check for check in batch if not check.compared]
        for line in summary(done) + per_layer(done, model.config.kinds) + nothing_left(nothing):
            print(line, flush=True)
        checks += done
        empty += nothing
    for line in unchecked(arrays, model.config, gradient_file):
        print(f"not checked: {line}")
    if not checks:
        raise UserError(f"{file}: nothing in it could be checked; it has {', '.join(arrays) or 'no arrays'}")
    draw_checks(checks, arguments.out)
    print(f"plot: {arguments.out}")
    wrong = [check for check in checks if not check.ok]
    if not wrong:
        untouched = dict.fromkeys(c.array for c in empty if all(c.array != other.array for other in checks))
        without = f"; nothing was left of {', '.join(untouched)}" if untouched else ""
        print(f"all {len(checks)} checks within tolerance{without}")
        return
    # In the order of the computation: layers, then what is made of all of them, then gradients, which come back.
    first = min(wrong, key=lambda c: (c.path == "training", c.layer is None, c.layer or 0))
    where = "" if first.layer is None else f"layer {first.layer} ({model.config.kinds[first.layer]}), "
    raise Off(
        f"first offender: {where}{first.array} by {first.path}: {first.error:.3g}, tolerance {first.tolerance:.3g}; "
        f"{len(wrong)} of {len(checks)} checks are off"
    )


class Off(SystemExit):
    """A number beyond its tolerance: one line, exit code 1."""

    def __init__(self, line: str):
        print(line, flush=True)
        super().__init__(OFF)


def summary(checks: list) -> list[str]:
    """One line for each array of a path: the worst of its layers."""
    groups = defaultdict(list)
    for check in checks:
        name = "gradients" if check.array.startswith("gradient of") else check.array
        groups[check.path, name].append(check)
    lines = []
    for (path, name), group in groups.items():
        worst = max(group, key=lambda c: c.share)
        parts = "" if len(group) == 1 else f" of {len(group)} {'weights' if name == 'gradients' else 'layers'}"
        at = "" if len(group) == 1 else f", worst {worst.array if name == 'gradients' else f'layer {worst.layer}'}"
        ties = max(check.left_out for check in group)
        lines.append(
            f"{'ok ' if all(c.ok for c in group) else 'OFF'} {path:18} {name + parts:28} {worst.error:9.2e}"
            f"  tolerance {worst.tolerance:7.0e}  largest {worst.largest:9.3g}{at}"
            + (f"  ({ties} left out after ties in the routing)" if ties else "")
        )
    return lines


def per_layer(checks: list, kinds: Sequence[str]) -> list[str]:
    """The hidden states of the chunked path, layer by layer, and how token probabilities correlate by any path."""
    hidden = [c for c in checks if c.array == "hidden" and c.path == "chunked"]
    lines = [f"    {'':22}  relative error  largest activation"] if hidden else []
    for c in hidden:
        relative = c.error / c.largest if c.largest else c.error
        lines.append(f"    {f'layer {c.layer} ({kinds[c.layer]})':22}  {relative:14.2e}  {c.largest:18.3g}")
    for c in checks:
        if c.correlation is not None:
            lines.append(f"    {c.path}: correlation of token probabilities ({c.array}) {c.correlation:.6f}")
    return lines


def nothing_left(checks: list) -> list[str]:
    """One line for each array of a path, with the layers of which no value was compared."""
    groups = defaultdict(list)
    for check in checks:
        groups[check.path, check.array].append(check)
    lines = []
    for (path, name), group in groups.items():
        where = "" if group[0].layer is None else f" of layers {', '.join(str(check.layer) for check in group)}"
        ties = any(check.left_out for check in group)
        reason = "all its tokens come after ties in the routing" if ties else "it holds no values"
        lines.append(f"not checked: {name}{where} by {path}: nothing is left to compare, {reason}")
    return lines


def between_modes(arguments: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from experiments.compare_layers.draw import draw_modes
    from experiments.compare_layers.goldens import cast
    from experiments.compare_layers.modes import compare_modes, sampled_tokens, with_loud_channel
    from m1jax.model import transformer
    from m1jax.train.pretrained import find_pretrained

    if arguments.random:
        config = cli.named_model(arguments.random, "--random")
        params = transformer.init(jax.random.key(arguments.seed), config)
    else:
        model = find_pretrained(arguments.hf, "float32")
        config, params = model.config, model.load()
    params, config = cast(params, config, "float32")
    if arguments.head_gain != 1.0:
        params = with_loud_channel(params, arguments.head_gain)
    tokens_BT = sampled_tokens(params, config, arguments.rows, arguments.tokens, arguments.seed)
    comparisons = compare_modes(params, config, tokens_BT)
    for name, c in comparisons.items():
        print(f"\n{name}\n  {'':22}  relative error  largest activation")
        for i, (error, largest) in enumerate(zip(c.errors, c.largest, strict=True)):
            label = f"layer {i} ({config.kinds[i]})" if i < config.num_layers else "head's input"
            print(f"  {label:22}  {error:14.2e}  {largest:18.3g}")
        for dtype, head in c.heads.items():
            print(
                f"  {dtype + ' head':22}  correlation of token probabilities {head.correlation:.6f}, "
                f"|log p| apart {head.mean_gap:.2e} in the mean, {head.largest_gap:.2e} at most"
            )
        print(f"  most of the gap comes from the {c.culprit}" + (" in bfloat16" if c.culprit == "head" else ""))
    draw_modes(comparisons, config.kinds, arguments.out)
    print(f"\nplot: {arguments.out}")


if __name__ == "__main__":
    cli.exit_with(main, memory="--rows or --tokens")
