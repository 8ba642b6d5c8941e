"""Claims about tokenizer_files.py: the files that a run keeps say the same as its config, to us and to others."""

import json
from pathlib import Path

import pytest

from m1jax.data.chat import render, render_conversation
from m1jax.data.settings import TokenizerConfig
from m1jax.data.tokenizer import ByteTokenizer, load_tokenizer
from m1jax.data.tokenizer_files import save_tokenizer

BPE = str(Path(__file__).parents[2] / "configs/tokenizers/reasoning_512.json")
TEXTS = ["", "héllo — 日本 🙂", " \n\t  x ", "\x00\xff", "345:1 172:1", "<think> 4+3=7</think><answer>7</answer><eos>"]


def saved(folder, **values):
    save_tokenizer(TokenizerConfig(**values), folder)
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("text", [*TEXTS, "".join(map(chr, range(0x250)))])
@pytest.mark.parametrize("specials", [True, False])
def test_the_byte_tokenizer_as_a_file_gives_the_same_ids(text, specials, tmp_path):
    ours, theirs = ByteTokenizer(), saved(tmp_path / "files")
    ids = ours.encode(text, specials)
    assert theirs.encode(text, specials) == ids and theirs.decode(ids, specials) == ours.decode(ids, specials)
    names = ("vocab_size", "pad_id", "bos_id", "stop_ids", "bos_token", "eos_token")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]


@pytest.mark.parametrize("path", ["", BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_plain_form_becomes_a_chat_template(path, system, tmp_path):
    theirs = saved(tmp_path / "files", path=path)
    for question in TEXTS[1:]:
        plain = render(question, system=system, tokenizer=load_tokenizer(path))
        assert render(question, template="tokenizer", system=system, tokenizer=theirs) == plain
    turns = [{"role": r, "content": c} for r, c in (("user", "1+1"), ("assistant", "2"), ("user", "2+2"))]
    ids = render_conversation(turns, template="tokenizer", tokenizer=theirs)
    assert theirs.decode(ids) == "<bos>1+1\n2<eos>2+2\n"


def test_a_template_file_goes_into_the_tokenizer_config(tmp_path):
    (tmp_path / "form.jinja").write_text("[{{ messages[-1]['content'] }}]")
    theirs = saved(tmp_path / "files", path=BPE, chat_template=str(tmp_path / "form.jinja"))
    assert theirs.chat_template == "[{{ messages[-1]['content'] }}]"


def test_files_beside_a_tokenizer_json_come_along_but_for_another_template(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(Path(BPE).read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</answer>", "chat_template": "theirs"}))
    (source / "special_tokens_map.json").write_text("{}")
    (source / "chat_template.jinja").write_text("theirs")
    (source / "model.safetensors").write_text("not for us")
    theirs = saved(tmp_path / "kept", path=str(source / "tokenizer.json"), chat_template="tokenizer")
    assert theirs.chat_template == "theirs" and theirs.eos_token == "</answer>"
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {*names, "chat_template.jinja"}
    theirs = saved(tmp_path / "plain", path=str(source / "tokenizer.json"))
    assert theirs.chat_template != "theirs" and theirs.eos_token == "</answer>"
    assert {p.name for p in (tmp_path / "plain").iterdir()} == names


def test_what_a_run_already_keeps_stays(tmp_path):
    saved(tmp_path / "files")
    before = (tmp_path / "files/tokenizer.json").read_bytes()
    save_tokenizer(TokenizerConfig(path=BPE), tmp_path / "files")
    assert (tmp_path / "files/tokenizer.json").read_bytes() == before
