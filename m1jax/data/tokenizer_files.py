"""A run's tokenizer as the files that Transformers and the servers read.

A run keeps them beside its checkpoints, so that they are found from any working directory, and an export takes them
along: whoever serves the model gets the stop token and the form of prompts that it was trained with.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from m1jax.data.chat import template_text
from m1jax.data.settings import TokenizerConfig
from m1jax.data.tokenizer import SPECIAL_TOKENS, ByteTokenizer, load_tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", *TEMPLATES,
)  # fmt: skip
"""Every file of a Hugging Face folder that says something of text."""

PLAIN_FORM = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)
"""The plain form of `m1jax.data.chat` as a chat template."""


def save_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    """Write the tokenizer files of a run into `folder`; where they are already there, nothing is done.

    Files that lie beside a `tokenizer.json` come along; `tokenizer_config.json` gets the run's own form of prompts.

    Raises:
        UserError: the config names a tokenizer or a template that is not there.
    """
    if folder.exists():
        return
    tokenizer = load_tokenizer(config.path, config.stop_tokens)
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    source, values = Path(config.path), {}
    if isinstance(tokenizer, ByteTokenizer):
        write_json(staging / TOKENIZER, byte_tokenizer_json())
    else:
        beside = TOKENIZER_FILES if source.name == TOKENIZER else ()
        for name in (name for name in beside if (source.parent / name).is_file()):
            if name not in TEMPLATES or config.chat_template == "tokenizer":
                shutil.copyfile(source.parent / name, staging / name)
        shutil.copyfile(source, staging / TOKENIZER)
        if (staging / TOKENIZER_CONFIG).is_file():
            values = json.loads((staging / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if not values:
        names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        names["pad_token"] = tokenizer.decode([tokenizer.pad_id])
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        values |= {kind: name for kind, name in names.items() if name}
    if config.chat_template != "tokenizer":
        values["chat_template"] = template_text(config.chat_template, tokenizer) if config.chat_template else PLAIN_FORM
    write_json(staging / TOKENIZER_CONFIG, values)
    os.replace(staging, folder)


def byte_tokenizer_json() -> dict[str, Any]:
    """The byte tokenizer as a `tokenizers` file: the same ids for every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = len(SPECIAL_TOKENS)
    vocab = {name: i for i, name in enumerate(SPECIAL_TOKENS)}
    vocab |= {letter: special + byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    return json.loads(tokenizer.to_str())


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level files: itself, or one of U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_json(path: Path, values: Any) -> None:
    """Write values the way Hugging Face folders hold them: indented, in UTF-8."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
