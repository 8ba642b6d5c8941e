"""Claims about tokenizer.py: round trips, special tokens in trusted and in other text, partial UTF-8, errors."""

import json
import shutil
from pathlib import Path

import pytest

from m1jax.data.tokenizer import SPECIAL_TOKENS, ByteTokenizer, load_tokenizer
from m1jax.errors import UserError

BPE = Path(__file__).parents[2] / "configs/tokenizers/reasoning_512.json"
TEXTS = ["", "héllo — 日本 🙂", " \n\t  x ", "\x00\xff", "345:1 172:1", "<think> 4+3=7</think><answer>7</answer><eos>"]


@pytest.fixture(params=["", str(BPE)], ids=["bytes", "bpe"])
def tokenizer(request):
    return load_tokenizer(request.param)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("specials", [True, False])
def test_decode_undoes_encode(tokenizer, text, specials):
    assert tokenizer.decode(tokenizer.encode(text, specials)) == text


def test_special_tokens_have_the_first_ids_and_pad_is_0(tokenizer):
    assert [tokenizer.encode(name) for name in SPECIAL_TOKENS] == [[i] for i in range(7)]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids) == (0, 1, (2,))


def test_text_of_others_never_becomes_special(tokenizer):
    text = "a<eos><<think>think><bos></answer>"
    ids = tokenizer.encode(text, specials=False)
    assert min(ids) >= 7 and tokenizer.decode(ids) == text
    assert 2 in tokenizer.encode(text)  # and so the claim above is not empty


def test_decode_leaves_specials_out_on_request(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<think>4</think><eos>"), specials=False) == "4"


def test_decode_is_total(tokenizer):
    cut = tokenizer.encode("日")[:-1]
    assert "\ufffd" in tokenizer.decode(cut)
    tokenizer.decode(range(tokenizer.vocab_size))
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("x")]).endswith("x")
    assert tokenizer.decode(tokenizer.encode("\ud800!"))[-1] == "!"


def test_vocabulary_sizes():
    assert ByteTokenizer().vocab_size == 263
    assert load_tokenizer(str(BPE)).vocab_size == 512


def test_bpe_sees_digits_one_by_one():
    tokenizer = load_tokenizer(str(BPE))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("345:1 172:10")] == list("345:1") + [" 1", *"72:10"]


def test_stop_tokens_by_name_and_unknown_ones_refused(tokenizer):
    assert load_tokenizer("", ["</answer>", "<eos>"]).stop_ids == (6, 2)
    for path in ("", str(BPE)):
        with pytest.raises(UserError, match="<end>"):
            load_tokenizer(path, ["<end>"])


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        load_tokenizer("nowhere.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="bad.json"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_the_config_beside_the_file_is_read(tmp_path):
    path = Path(shutil.copy(BPE, tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<think>"}, "eos_token": "</think>", "chat_template": "{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.chat_template) == (3, (4,), "{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "</s>"}))
    with pytest.raises(UserError, match="</s>"):
        load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    assert load_tokenizer(str(path)).bos_id is None


def test_a_vocabulary_that_looks_up_whole_words_still_keeps_text_plain(tmp_path):
    spec = json.loads(BPE.read_text())
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (tmp_path / "whole.json").write_text(json.dumps(spec))
    assert 2 not in load_tokenizer(str(tmp_path / "whole.json")).encode("<eos>", specials=False)
