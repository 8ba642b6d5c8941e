"""Talk to a model, or let it continue a text: tokens are printed as they are sampled.

    python -m experiments.generate --model=runs/rl --prompt="How many 1 bits are there in ..."
    python -m experiments.generate --model=smollm2                       # line by line from stdin, a conversation
    python -m experiments.generate --model=smollm2 --complete --prompt="Once upon a time"

PATH is a run folder, one of its checkpoints/NUMBER, a Hugging Face folder, a .gguf file or "smollm2". Prompts have the
form that a run's config names, else that of the tokenizer's chat template, else the plain question form. A chat
template makes stdin a conversation; without one every line is a question of its own. The answer goes to stdout, a line
about it to stderr; Ctrl-C ends the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import cli
from m1jax.data.chat import render_conversation
from m1jax.data.tokenizer import Tokenizer, load_tokenizer
from m1jax.errors import UserError
from m1jax.types import Params, Sampling

BYTES = "bytes"


@dataclass(frozen=True)
class Form:
    """How text becomes a prompt and an answer becomes text.

    Attributes:
        tokenizer: of both.
        stop_ids: ids that end an answer; no part of its text.
        template: "", "tokenizer" or a file, as in `m1jax.data.chat`; None continues raw text.
        system: the system prompt.
        bos: raw text gets a BOS in front.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    template: str | None
    system: str
    bos: bool

    def prompt(self, messages: Sequence[dict[str, str]]) -> Sequence[int]:
        """Ids of the conversation, or of the last message's raw text, in which special tokens are read."""
        if self.template is not None:
            return render_conversation(messages, template=self.template, system=self.system, tokenizer=self.tokenizer)
        ids, bos = self.tokenizer.encode(messages[-1]["content"]), self.tokenizer.bos_id
        return [bos, *ids] if self.bos and bos is not None and ids[:1] != [bos] else ids


def main(argv: Sequence[str]) -> None:
    generate(parse(argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; `sampling` among them is the `Sampling`."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", required=True, metavar="PATH")
    flag("--prompt", metavar="TEXT", help="answer this and end; without it, every line of stdin")
    flag("--complete", action="store_true", help="continue the text as it is, special tokens in it included")
    flag("--max_tokens", type=int, default=256, help="longest answer [256]")
    flag("--temperature", type=float, default=1.0, help="0 is greedy [1]")
    flag("--top_p", type=float, default=1.0)
    flag("--top_k", type=int, default=0)
    flag("--seed", type=int, default=0)
    flag("--system", metavar="TEXT", help="system prompt")
    flag("--tokenizer", metavar="PATH", help=f'a tokenizer.json or its folder, or "{BYTES}"')
    flag("--template", metavar="FILE", help='Jinja chat template; "tokenizer" for its own, "" for the plain form')
    flag("--stop_tokens", nargs="+", metavar="TOKEN", help="tokens that end an answer [the model's own]")
    flag("--dtype", choices=("float32", "bfloat16"), default="", help="compute and keep weights in this")
    arguments = parser.parse_args(argv)
    if arguments.complete and not (arguments.template is None and arguments.system is None):
        raise UserError("--complete: continues the text as it is; leave --template and --system out")
    if not 0 <= arguments.seed < 1 << 31:
        raise UserError(f"--seed: {arguments.seed} must be at least 0 and below 2**31")
    try:
        a = arguments
        arguments.sampling = Sampling(a.max_tokens, a.temperature, a.top_p, a.top_k)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return arguments


def generate(arguments: argparse.Namespace) -> None:
    """Load the model, then answer the prompt or each line of stdin."""
    from m1jax.train.pretrained import find_pretrained  # a second of imports, after what the flags can get wrong

    model = find_pretrained(arguments.model, arguments.dtype, log=lambda line: print(line, file=sys.stderr))
    form = open_form(model, arguments)
    if form.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{arguments.model}: a model of {model.config.vocab_size} ids, and the tokenizer has "
            f"{form.tokenizer.vocab_size}; give the model's own with --tokenizer=PATH"
        )
    form.prompt([{"role": "user", "content": arguments.prompt or "?"}])  # a template that fails, before the weights
    speaker = Speaker(*load(model, arguments.dtype), form, arguments.sampling, arguments.seed)
    if arguments.prompt is not None:
        if not speaker.answer([{"role": "user", "content": arguments.prompt}])[1]:
            sys.exit(130)
        return
    messages: list[dict[str, str]] = []
    for line in stdin_lines():
        if not form.template:  # one question, or one text, at a time
            messages = []
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": speaker.answer(messages)[0]})


def open_form(model: Any, arguments: argparse.Namespace) -> Form:
    """The tokenizer that belongs to a model (or the one asked for), its stop ids, and the form of prompts.

    Raises:
        UserError: there is no tokenizer, or it lacks what was named.
    """
    from m1jax.weights.gguf import GGUFModel

    own = model.meta.get("config", {}).get("tokenizer", {})
    mend = f'give one with --tokenizer=PATH, a tokenizer.json or its folder ("{BYTES}": ids are bytes, as m1jax counts)'
    stop_tokens = arguments.stop_tokens or own.get("stop_tokens", ())
    with ExitStack() as stack:
        path = arguments.tokenizer
        if path is not None:
            path = "" if path == BYTES else path
        elif isinstance(model.source, GGUFModel):
            path = stack.enter_context(tempfile.TemporaryDirectory())
            for name in ("tokenizer_json", "tokenizer_config"):
                values = getattr(model.source, name)
                Path(path, name.replace("_json", "") + ".json").write_text(json.dumps(values), encoding="utf-8")
        else:
            path = model.tokenizer
            if path is None:
                raise UserError(f"{model.path}: nothing is known of its tokenizer; {mend}")
        if path and Path(path).is_dir():
            path = str(Path(path, "tokenizer.json"))
        if path and not Path(path).is_file():
            raise UserError(f"{model.path}: its tokenizer {path} is not there; {mend}")
        tokenizer = load_tokenizer(path, stop_tokens)
        beside = Path(path).parent / "tokenizer_config.json" if path else None
        adds_bos = not (beside and beside.is_file()) or _read(beside).get("add_bos_token", True)

    stop_ids = set(tokenizer.stop_ids)
    if not stop_tokens and arguments.tokenizer is None:
        stop_ids |= set(_eos_ids(model))
    template = arguments.template
    if template is None:
        template = own.get("chat_template", "") if own else "tokenizer" if tokenizer.chat_template else ""
        if template and tokenizer.chat_template and arguments.tokenizer is None:  # a run keeps it with its tokenizer
            template = "tokenizer"
    system = own.get("system_prompt", "") if arguments.system is None else arguments.system
    return Form(tokenizer, frozenset(stop_ids), None if arguments.complete else template, system, bool(adds_bos))


def _eos_ids(model: Any) -> list[int]:
    """End tokens that generation_config.json lists; a model may have more of them than its tokenizer says."""
    path = model.files and model.files / "generation_config.json"
    values = _read(path) if path and path.is_file() else {}
    ids = values.get("eos_token_id")
    return [int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def load(model: Any, dtype: str) -> tuple[Params, Any]:
    """(params on the first device, config); `dtype` holds for a checkpoint too."""
    from m1jax.weights.hf_folder import with_dtype

    config = with_dtype(model.config, dtype) if dtype else model.config
    return dataclasses.replace(model, config=config).load(), config


class Speaker:
    """A loaded model that answers on stdout."""

    def __init__(self, params: Params, config: Any, form: Form, sampling: Sampling, seed: int):
        from m1jax.train.clock import Clock

        self._params, self._config, self._form, self._sampling, self._seed = params, config, form, sampling, seed
        self._answers, self._clock = 0, Clock()

    def answer(self, messages: Sequence[dict[str, str]]) -> tuple[str, bool]:
        """Print the answer while it is sampled, then a line about it on stderr.

        Returns:
            Its text, and whether it came to its end by itself (False: Ctrl-C).
        """
        from m1jax.rl.stream import stream

        form, prompt = self._form, self._form.prompt(messages)
        sampled = stream(
            self._params, self._config, prompt, self._sampling, form.stop_ids, self._seed, prompt_index=self._answers
        )
        self._answers += 1
        text = Text(form.tokenizer, prompt if form.template is None else ())
        count, end = 0, "max_tokens"
        try:
            with self._clock.stage("answer"):
                for token, _ in sampled:
                    count += 1
                    if token in form.stop_ids:
                        end = "a stop token"
                    else:
                        print(text.add(token), end="", flush=True)
                print(text.rest(), end="", flush=True)
        except KeyboardInterrupt:
            end = "Ctrl-C"
        print(flush=True)
        seconds = self._clock.lap()
        speed = count / max(seconds["answer"], 1e-9)
        print(
            f"{count} tokens, {speed:.1f} tokens/s after {seconds['compile']:.1f} s of compilation, ended by {end}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return text.shown, end != "Ctrl-C"


class Text:
    """The text of an answer as it grows; a character whose bytes are not all there yet waits.

    Args:
        tokenizer: what decodes it.
        before: ids of the text that it continues: some tokenizers write no space at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer, self._ids, self._skip = tokenizer, list(before), 0
        self._forget()
        self.shown = ""

    def add(self, token: int) -> str:
        """What can be printed now that this token has come."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = self._show(text.rstrip("\ufffd"))
        if len(text) == self._skip:  # nothing waits
            self._forget()
        return new

    def rest(self) -> str:
        """What is left at the end, broken characters included."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[self._skip :]
        self._skip += len(new)
        self.shown += new
        return new

    def _forget(self) -> None:
        """Keep a few ids as context: to decode all of them for every token would take quadratic time."""
        if len(self._ids) > 64:
            self._ids = self._ids[-16:]
        self._skip = len(self._tokenizer.decode(self._ids))


def stdin_lines() -> Iterator[str]:
    """Lines of stdin without their ends, empty ones left out; a person sees a sign that it is their turn."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sign = "> " if sys.stdin.isatty() and sys.stderr.isatty() else ""
    while True:
        print(sign, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(end="\n" if sign else "", file=sys.stderr)
            return
        if line.strip():
            yield line.rstrip("\r\n")


if __name__ == "__main__":
    cli.exit_with(main, memory="--max_tokens")
