"""Text to token ids and back: bytes with special tokens built in, or a Hugging Face `tokenizers` file.

Both classes have one interface:

    encode(text, specials=True) -> list[int]    specials=False: text of others; "<eos>" in it stays five characters
    decode(ids, specials=True) -> str           total: broken UTF-8 becomes U+FFFD; specials=False leaves them out
    vocab_size, pad_id, bos_id (or None), stop_ids, bos_token, eos_token, chat_template (or None)

It does not know what a prompt looks like (see chat.py), and nothing here ever adds a token that the text lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from m1jax.errors import UserError

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>")
"""Special tokens of our own tokenizers, in order of their ids from 0 on."""


class ByteTokenizer:
    """The seven special tokens (ids 0 to 6), then the 256 bytes (ids 7 to 262)."""

    vocab_size = len(SPECIAL_TOKENS) + 256
    pad_id, bos_id = 0, 1
    bos_token, eos_token, chat_template = "<bos>", "<eos>", None

    def __init__(self, stop_tokens: Sequence[str] = ()):
        """Make the tokenizer; `stop_tokens` are names of special tokens, ("<eos>",) where empty."""
        names = tuple(stop_tokens) or ("<eos>",)
        self.stop_ids = tuple(_special_id(name, _BYTE_SPECIALS, "the byte tokenizer") for name in names)

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Return the ids of `text`; a special token's name in it becomes that token unless `specials` is False."""
        parts = _BYTE_SPLIT.split(text) if specials else [text]
        ids: list[int] = []
        for part in parts:
            if specials and part in _BYTE_SPECIALS:
                ids.append(_BYTE_SPECIALS[part])
            else:  # a lone surrogate has no UTF-8 form; "?" keeps encode total
                ids.extend(byte + len(SPECIAL_TOKENS) for byte in part.encode("utf-8", errors="replace"))
        return ids

    def decode(self, ids: Iterable[int], specials: bool = True) -> str:
        """Return the text of `ids`; special tokens by name, or left out where `specials` is False."""
        raw = bytearray()
        for index in map(int, ids):
            if 0 <= index < len(SPECIAL_TOKENS):
                raw += SPECIAL_TOKENS[index].encode() if specials else b""
            elif index < self.vocab_size and index >= 0:
                raw.append(index - len(SPECIAL_TOKENS))
            else:  # a model's vocabulary may be padded beyond the tokenizer's
                raw += "\ufffd".encode()
        return raw.decode("utf-8", errors="replace")


_BYTE_SPECIALS = {name: index for index, name in enumerate(SPECIAL_TOKENS)}
_BYTE_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


class HFTokenizer:
    """A Hugging Face `tokenizers` JSON file.

    "Special" is every added token of the file, whether or not the file also calls it special: models write
    `<think>` both ways. bos, eos, pad and the chat template come from `tokenizer_config.json` beside the file where
    there is one; else bos, eos and pad are the added tokens "<bos>", "<eos>" and "<pad>" where the file has them.
    """

    def __init__(self, path: str | Path, stop_tokens: Sequence[str] = ()):
        """Read `path`; the stop tokens are `stop_tokens`, or eos where that is empty.

        Raises:
            UserError: the file is missing or no tokenizer, or lacks a token named here or in its config.
        """
        from tokenizers import Tokenizer  # 0.1 s that a byte-level run need not pay

        path = Path(path)
        if not path.is_file():
            raise UserError(f'tokenizer: no file {path}; give the path of a tokenizer.json, or "" for bytes')
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_str(json.dumps(spec))
            self._plain = Tokenizer.from_str(json.dumps(_without_specials(spec)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer: {path} is not a Hugging Face tokenizers file: {error}") from error
        specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self._special_ids = frozenset(specials.values())
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

        config = _read_config(path.with_name("tokenizer_config.json"))
        self.chat_template: str | None = config.get("chat_template")
        self.bos_token, self.eos_token, pad_token = (
            config.get(f"{kind}_token", f"<{kind}>" if f"<{kind}>" in specials else None)
            for kind in ("bos", "eos", "pad")
        )
        self.bos_id = None if self.bos_token is None else _special_id(self.bos_token, specials, path)
        # Padding is masked wherever it is computed, so any id serves where the file names none.
        self.pad_id = 0 if pad_token is None else _special_id(pad_token, specials, path)
        names = tuple(stop_tokens) or ((self.eos_token,) if self.eos_token else ())
        if not names:
            raise UserError(f"tokenizer: {path} names no end token; say which tokens stop a response (stop_tokens)")
        self.stop_ids = tuple(_special_id(name, specials, path) for name in names)

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Return the ids of `text`; a special token's name in it becomes that token unless `specials` is False."""
        tokenizer = self._tokenizer if specials else self._plain
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # the library panics on a lone surrogate
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], specials: bool = True) -> str:
        """Return the text of `ids`; special tokens by name, or left out where `specials` is False."""
        kept = [index for index in map(int, ids) if specials or index not in self._special_ids]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


Tokenizer = ByteTokenizer | HFTokenizer


def load_tokenizer(path: str = "", stop_tokens: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer of the file `path`, or the byte tokenizer where `path` is empty.

    Args:
        path: a `tokenizers` JSON file, or "".
        stop_tokens: names of the tokens that end a response; empty means the tokenizer's end token.

    Raises:
        UserError: the file is missing or unreadable, or a token is not in it; the message names it.
    """
    return HFTokenizer(path, stop_tokens) if path else ByteTokenizer(stop_tokens)


def check_vocab_size(vocab_size: int, tokenizer: Tokenizer, path: str) -> None:
    """Raise UserError where a model of this vocabulary has no row for some id of the tokenizer read from `path`."""
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"config.model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer "
            f"{path or '(bytes)'}; raise it"
        )


def _without_specials(spec: dict) -> dict:
    """Return the tokenizer file's tree with no special token left to match: what encodes other people's text."""
    model = dict(spec["model"])
    if model.get("type") == "BPE":  # a whole-word lookup (ignore_merges) could still find them in the vocabulary
        gone = {token["content"] for token in spec["added_tokens"]} - {model.get("unk_token")}
        model["vocab"] = {piece: index for piece, index in model["vocab"].items() if piece not in gone}
    return {**spec, "model": model, "added_tokens": [], "post_processor": None}


def _read_config(path: Path) -> dict:
    """Return tokenizer_config.json with its tokens as plain strings (the file may hold {"content": ...}); or {}."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer: {path} is not JSON: {error}") from error
    return {key: value["content"] if isinstance(value, dict) and "content" in value else value
            for key, value in config.items()}  # fmt: skip


def _special_id(name: str, specials: dict[str, int], where: object) -> int:
    if name not in specials:
        raise UserError(f"tokenizer: {where} has no special token {name!r}; it has {', '.join(sorted(specials))}")
    return specials[name]
