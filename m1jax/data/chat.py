"""Prompts from questions and conversations: text in, the ids that the model reads out.

A template is rendered around marks that stand for the contents, and each content is then put in its mark's place. So a
content can never act on the template, a template that drops or repeats one is noticed, and special tokens are read in
the template only: "<eos>" inside a question stays text. The price: a template that works on contents (cuts the thought
out of earlier answers, say) finds nothing to work on.

    template ""            <bos>[system\\n]question\\n      the model answers <think>…</think><answer>…</answer><eos>
    template "tokenizer"   the chat template that tokenizer_config.json carries
    template PATH          a Jinja file
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1jax.data.tokenizer import Tokenizer
from m1jax.errors import UserError

_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them


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
    return render_conversation(
        [{"role": "user", "content": question}], template=template, system=system, tokenizer=tokenizer
    )


def render_conversation(
    messages: Sequence[Mapping[str, str]], *, template: str = "", system: str = "", tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Return a whole conversation as the prompt of its next answer; `render` is the case of one question.

    Args:
        messages: {"role": "user" or "assistant", "content": untrusted text} in order, the system prompt left out.
        template, system, tokenizer: as in `render`; the plain form "" has no turns and takes one question only.

    Raises:
        UserError: as `render`; each content has to occur once, and in order.
    """
    if template:
        roles = tuple(message["role"] for message in messages)
        pieces = _layout(template_text(template, tokenizer), template, system, roles, _names(tokenizer))
    elif len(messages) == 1:
        pieces = f"{tokenizer.bos_token or ''}{system}{system and chr(10)}", "\n"
    else:
        raise UserError('template "": the plain form has no turns; give a chat template, or one question at a time')
    text, ids = pieces[0], []
    for message, after in zip(messages, pieces[1:], strict=True):
        content = message["content"]
        if tokenizer.encode(content) == (plain := tokenizer.encode(content, specials=False)):
            text += content + after  # encoded with what surrounds it, so that no merge is lost at the seams
        else:
            ids, text = [*ids, *tokenizer.encode(text), *plain], after
    return tuple(_one_bos([*ids, *tokenizer.encode(text)], tokenizer, template))


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


def template_text(template: str, tokenizer: Tokenizer) -> str:
    """The Jinja source of a template that is not the plain form.

    Raises:
        UserError: there is no such file, or the tokenizer carries none.
    """
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
def _layout(
    source: str, name: str, system: str, roles: tuple[str, ...], names: tuple[tuple[str, str], ...]
) -> tuple[str, ...]:
    """Return what the template writes before, between and after the contents of messages with these roles.

    With string content or else list content. A template made for one form does not always fail on the other:
    `content[0]["text"]` of a string is an undefined value, which Jinja prints as nothing. So the test is that every
    content is there once, not that no error came.
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
        messages += [{"role": role, "content": wrap(f"\ue000{i}\ue001")} for i, role in enumerate(roles)]
        try:
            text = compiled.render(messages=messages, add_generation_prompt=True, **dict(names))
        except Exception as error:  # a template runs any expression, so it may raise anything
            reasons.append(str(error) or type(error).__name__)
            continue
        pieces = _MARK.split(text)  # text, number, text, number, ..., text
        found = [int(number) for number in pieces[1::2]]
        if found == list(range(len(roles))) and system in text:
            return tuple(pieces[::2])
        reasons.append(_misplaced(found, len(roles)) + f", the system prompt {text.count(system)}" * bool(system))
    raise UserError(f"template {name}: with string content: {reasons[0]}; with list content: {reasons[1]}")


def _misplaced(found: list[int], count: int) -> str:
    """What is wrong with the marks that a template wrote."""
    for number in range(count):
        if found.count(number) != 1:
            who = "the question" if count == 1 else f"message {number + 1} of {count}"
            return f"{who} occurs {found.count(number)} times"
    return "the messages occur once" if found == sorted(found) else "the messages change places"
