"""Chat prompts: put a user's message into the chat template, and find it again in a prompt."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emt.errors import ConfigError

_FIRST, _REPLY, _LAST = "Xylophone.", "Quokka.", "Zeppelin."  # messages of an example chat
_NO_CHAT = "Use --no-chat, or set chat to False."
_BEGINNINGS = ("Xylophone", "who", "1", " a", "\n", "\n\nA", '"', "\u00e9", "\u6587")  # of messages


def in_template(
    tokenizer: PreTrainedTokenizerBase, message: str, chat: bool | None = None
) -> str | None:
    """Put a user's message into the chat template, with all special tokens.

    `chat` is True to require a template, False for none, None to use one that takes a message of
    the user alone. Without a template the result is None: the message is a plain text.

    Raises:
        ConfigError: `chat` is True, and there is no such template; says why.
    """
    if chat is False:
        return None
    try:
        return _prompt_of(tokenizer, [("user", message)])
    except ConfigError:
        if chat:
            raise
        return None


def _prompt_of(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]]) -> str:
    """Return the prompt of a chat, of pairs (role, content).

    Raises:
        ConfigError: there is no template, or none that takes the chat.
    """
    if not tokenizer.chat_template:
        raise ConfigError(f"this model's tokenizer has no chat template. {_NO_CHAT}")
    reasons = []
    for content_of in (str, _as_parts):
        render = functools.partial(_rendered, tokenizer, content_of=content_of)
        try:
            example = render([("user", _FIRST)])
            if _FIRST.lower() in example.lower() and "{'type'" not in example:
                return render(messages)
            reasons.append("it leaves the message out")
        except Exception as error:  # a template may raise whatever it likes
            reasons.append(textwrap.shorten(str(error) or repr(error), 200, placeholder=" ..."))
    reason = reasons[0].rstrip(".")
    raise ConfigError(
        f"this model's chat template does not take a user's message: {reason}. {_NO_CHAT}"
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[tuple[str, str]],
    *,
    content_of: Callable[[str], Any],
) -> str:
    turns = [{"role": role, "content": content_of(content)} for role, content in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _as_parts(content: str) -> list[dict[str, str]]:
    """Return a message's content as templates of models take it that also see images."""
    return [{"type": "text", "text": content}]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, message: str, chat: bool | None = None
) -> Tensor:
    """Return the tokens of a user's message as the model is asked it, (T,) int64.

    The arguments and errors are those of `in_template`; a plain text has the special tokens that
    the tokenizer adds.
    """
    text = in_template(tokenizer, message, chat)
    if text is None:
        encoded = tokenizer(message, verbose=False)
    else:  # a template writes its own special tokens
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> Tensor:
    """Return the tokens of a chat with which the model is asked for the next message, (T,) int64.

    Args:
        tokenizer: the model's, with a chat template.
        messages: pairs (role, content), the first one first.

    Raises:
        ConfigError: there is no template, or none that takes the chat.
    """
    text = _prompt_of(tokenizer, list(messages))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def last_message(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return (first, stop) of the user's last message among the tokens of a prompt.

    None if the marks that the template puts around a message are unknown or not in the prompt.
    """
    if not tokenizer.chat_template:
        return None
    of_templates: dict[str, _Marks | None] = vars(tokenizer).setdefault("_emt_marks", {})
    template = str(tokenizer.chat_template)
    if template not in of_templates:
        of_templates[template] = _search_marks(tokenizer)
    marks = of_templates[template]
    return None if marks is None else marks.last_message(ids)


@dataclass(frozen=True)
class _Marks:
    """The tokens that a chat template has before and after a user's message.

    Of those before, `num_stable` are the same whatever the message begins with; the others may join
    it, as a space joins a word.
    """

    before: list[int]
    num_stable: int
    after: list[int]

    def last_message(self, ids: list[int]) -> tuple[int, int] | None:
        """Return (first, stop) of the last message between the marks."""
        stable = self.before[: self.num_stable]
        starts = range(len(ids) - len(stable), -1, -1)
        start = next((i for i in starts if ids[i : i + len(stable)] == stable), None)
        if start is None:
            return None
        start += len(stable)
        start += num_shared(ids[start:], self.before[len(stable) :])
        length = len(self.after)
        stop = next(
            (i for i in range(start, len(ids)) if ids[i : i + length] == self.after), len(ids)
        )
        return (start, stop) if stop > start else None


def _search_marks(tokenizer: PreTrainedTokenizerBase) -> _Marks | None:
    """Find the marks in prompts that the template makes of example messages."""
    roles = ("user", "assistant", "user")
    chat = list(zip(roles, (_FIRST, _REPLY, _LAST), strict=True))
    try:
        short, long = _prompt_of(tokenizer, chat[:1]), _prompt_of(tokenizer, chat)
    except ConfigError:
        return None
    if _FIRST not in short or _REPLY not in long or _LAST not in long:
        return None
    opening, other = short.partition(_FIRST)[0], long.partition(_REPLY)[2].partition(_LAST)[0]
    opening = opening[len(opening) - num_shared(opening[::-1], other[::-1]) :]
    closing, other = short.partition(_FIRST)[2], long.partition(_LAST)[2]
    closing = closing[: num_shared(closing, other)]
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    before, after = list(encode(opening)), list(encode(closing))
    num_stable = min(num_shared(before, encode(opening + text)) for text in _BEGINNINGS)
    # The end of a message may join what follows it: the first special token is enough.
    special = set(tokenizer.all_special_ids)
    after = next(([idx] for idx in after if idx in special), after[:1])
    if not before or not after:
        return None
    # From the last special token on that the user's header alone has; its stable part may be what
    # all headers begin with.
    starts = [i for i, idx in enumerate(before) if idx in special][::-1] or [0]
    for start in starts:
        for count in (num_stable - start, len(before) - start):
            # One token that is not special could be any word of a message.
            is_mark = count > 1 or (count == 1 and before[start] in special)
            marks = _Marks(before[start:], count, after)
            if is_mark and _are_right(marks, tokenizer, long):
                return marks
    return None


def _are_right(marks: _Marks, tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Tell whether marks find the last message of the example chat in its prompt."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    ids = list(encode(prompt))
    start, stop = marks.last_message(ids) or (0, 0)
    message = ids[start:stop]
    if message == list(encode(_LAST)):  # a small vocabulary may not know the word
        return True
    return str(tokenizer.decode(message)).strip() == _LAST


def num_shared(items: Sequence[Any], others: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their start."""
    pairs = zip(items, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
