"""Prompts from questions: one question in, the ids that the model reads out.

A template is rendered once, around a mark that stands for the question, and each question is then put in the mark's
place. So a question can never act on the template, a template that drops or repeats the question is noticed, and
special tokens are read in the template only: "<eos>" inside a question stays text.

    template ""            <bos>[system\\n]question\\n      the model answers <think>…</think><answer>…</answer><eos>
    template "tokenizer"   the chat template that tokenizer_config.json carries
    template PATH          a Jinja file
"""

from __future__ import annotations

import functools
from pathlib import Path

from m1jax.data.tokenizer import Tokenizer
from m1jax.errors import UserError

_MARK = "\ue000question\ue001"  # private-use characters: no template writes them


def render(question: str, *, template: str = "", system: str = "", tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt of `question` as token ids, with exactly one BOS at its start where the tokenizer has one.

    Args:
        question: untrusted text.
        template: "", "tokenizer", or the path of a Jinja chat template.
        system: the system prompt, trusted like the template; "" for none.
        tokenizer: what encodes it.

    Raises:
        UserError: the template is missing, fails, does not hold the question exactly once, or writes BOS elsewhere.
    """
    if template:
        before, after = _layout(_template_text(template, tokenizer), template, system, _names(tokenizer))
    else:
        before, after = f"{tokenizer.bos_token or ''}{system}{system and chr(10)}", "\n"
    if tokenizer.encode(question) == (plain := tokenizer.encode(question, specials=False)):
        ids = tokenizer.encode(before + question + after)  # whole, so that no merge is lost at the seams
    else:
        ids = tokenizer.encode(before) + plain + tokenizer.encode(after)
    return tuple(_one_bos(ids, tokenizer, template))


def _one_bos(ids: list[int], tokenizer: Tokenizer, template: str) -> list[int]:
    """Return `ids` with one BOS in front.

    None at all: the template leaves it to the tokenizer, so it is added. Several in front: template and tokenizer
    both wrote it, so one stays. A BOS further on is a turn marker where the template opens with a special token,
    BOS itself (ChatML: one before each turn) or another (MiniMax: <begin_of_document>, then BOS before each turn),
    and then nothing is changed; otherwise nobody can tell what was meant, and we ask.
    """
    bos = tokenizer.bos_id
    if bos is None:
        return ids
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    if bos not in ids[start:]:
        return [bos, *ids[start:]]
    if start == 1 or (start == 0 and ids[:1] and tokenizer.decode(ids[:1], specials=False) == ""):
        return ids
    raise UserError(
        f"template {template or repr('')}: BOS {tokenizer.bos_token!r} occurs after the start of the prompt; "
        "write it once, first, or let the template open with another special token"
    )


def _template_text(template: str, tokenizer: Tokenizer) -> str:
    if template == "tokenizer":
        if not isinstance(tokenizer.chat_template, str):
            raise UserError('template "tokenizer": this tokenizer carries no chat template; give the path of one')
        return tokenizer.chat_template
    path = Path(template)
    if not path.is_file():
        raise UserError(f'template: no file {path}; give the path of a Jinja chat template, "tokenizer", or ""')
    return path.read_text(encoding="utf-8")


def _names(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    return ("bos_token", tokenizer.bos_token or ""), ("eos_token", tokenizer.eos_token or "")


@functools.lru_cache(maxsize=64)
def _layout(source: str, name: str, system: str, names: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """Return what the template writes before and after the question, with string content or else list content.

    A template made for one form does not always fail on the other: `content[0]["text"]` of a string is an undefined
    value, which Jinja prints as nothing. So the test is that the question is there once, not that no error came.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The options and helpers that chat templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"template {name}: {error}") from error

    reasons = []
    for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": "system", "content": wrap(system)}] if system else []
        messages.append({"role": "user", "content": wrap(_MARK)})
        try:
            text = compiled.render(messages=messages, add_generation_prompt=True, **dict(names))
        except Exception as error:  # a template runs any expression, so it may raise anything
            reasons.append(str(error) or type(error).__name__)
            continue
        if text.count(_MARK) == 1 and system in text:
            before, after = text.split(_MARK)
            return before, after
        reasons.append(f"the question occurs {text.count(_MARK)} times, the system prompt {text.count(system)}")
    raise UserError(f"template {name}: with string content: {reasons[0]}; with list content: {reasons[1]}")
