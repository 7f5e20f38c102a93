"""`Conversation`: a chat with a model and its memory, whose turns can become memories."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from emt.answer import Answer, answer_to, check_prompt, seeded, tokenizer_of
from emt.conversation.cache import ChatCache
from emt.conversation.turns import Said, only_asks, remember_turn, turns_of
from emt.errors import ConfigError
from emt.memory.memory import Memory
from emt.model.chat import chat_ids
from emt.model.devices import input_device
from emt.model.positions import max_positions
from memory_backends.layout import Metadata

_FULL, _KEPT = 3 / 4, 1 / 2  # of the model's positions; recalled passages need some, too


class Conversation:
    """A chat, turn after turn, in one cache.

    When it fills the model's positions, its oldest turns are left out of the prompt; the memory
    still has those that it remembers.

    Args:
        model: the model the memory is attached to.
        memory: with the tokenizer of a model that chats.
        name: of the conversation, for what is remembered of it. Turns that are there are followed.
        remembers: whether turns become memories as they are said.
        metadata: of remembered turns, beside what `remember_turn` says of them.

    Attributes:
        messages: what the next prompt has of the chat: (role, content), the user's first.

    Raises:
        ConfigError: the tokenizer has no chat template that takes a message.
        MemoryUseError: the memory has no tokenizer, or was closed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: Memory,
        *,
        name: str,
        remembers: bool = False,
        metadata: Metadata | None = None,
    ) -> None:
        self._model, self._memory = model, memory
        self.name, self.remembers = name, remembers
        self._metadata = metadata
        self.messages: list[tuple[str, str]] = []
        self._cache = ChatCache()
        self._num_turns = max(turns_of(memory, name), default=0)
        # Documents of the turns that the next prompt has; None for one that is not remembered.
        self._in_prompt: list[str | None] = []
        chat_ids(tokenizer_of(memory), [("user", "Hello.")])

    def ask(
        self,
        message: str,
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], object] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        sampling: dict[str, Any] | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer a message, and remember both if the conversation does so.

        What the prompt has of the chat is not recalled as well. A message that only asks what the
        memory answers is not remembered.

        Args:
            message: what the user says.
            max_new_tokens: where to stop at the latest.
            on_text: called with each piece of the answer.
            should_stop: asked after each token; what was said until then is the answer.
            sampling: of `emt.answer.sampling_options`; None for greedy.
            seed: as for `answer`.
            **settings: as in `Memory.using`.

        Raises:
            ConfigError: the message is empty, not Unicode or too long, or as `answer`.
            DocumentError, MemoryUseError, StoreError: as `answer`, and as `remember_turn`.
        """
        check_prompt(message)
        messages, prompt = self._prompt(message, max_new_tokens)
        num_left_out = (len(self.messages) + 1 - len(messages)) // 2
        in_prompt = self._in_prompt[num_left_out:]
        input_ids = torch.tensor([prompt], device=input_device(self._model))
        try:
            with (
                self._memory.using(**self._scope(settings, in_prompt)),
                seeded(seed, input_ids.device),
            ):
                answered, filled = answer_to(
                    self._model,
                    self._memory,
                    input_ids,
                    message,
                    max_new_tokens=max_new_tokens,
                    on_text=on_text,
                    past_key_values=self._cache.cut_for(prompt),
                    stopping_criteria=StoppingCriteriaList([_Asking(should_stop)]),
                    **(sampling or {"do_sample": False}),
                )
        except BaseException:  # half of a turn may be in it
            self._cache.clear()
            raise
        token_ids = [*prompt, *answered.token_ids]
        self._cache.keep(filled, token_ids)
        self.messages = [*messages, ("assistant", answered.text)]
        self._in_prompt = in_prompt
        self._num_turns += 1
        name = None
        if self.remembers and not (answered.passages and only_asks(message)):
            said = Said(message, answered.text, token_ids, len(prompt), self._cache.cache)
            name = remember_turn(self._memory, said, self.name, self._num_turns, self._metadata)
        self._in_prompt.append(name)
        return answered

    def forget(self) -> int:
        """Remove what the memory has of this conversation, and begin anew; return how many turns.

        Raises:
            MemoryUseError, StoreError: as `Memory.remove`.
        """
        names = turns_of(self._memory, self.name).values()
        self._memory.remove(*names)
        self.messages, self._in_prompt, self._num_turns = [], [], 0
        self._cache.clear()
        return len(names)

    def _prompt(self, message: str, max_new_tokens: int) -> tuple[list[tuple[str, str]], list[int]]:
        """Return the messages of the next prompt, and its tokens; the oldest turns may not fit.

        Raises:
            ConfigError: the message alone does not fit.
        """
        positions = max_positions(self._model.config.get_text_config())
        messages = [*self.messages, ("user", message)]
        tokenizer = tokenizer_of(self._memory)
        prompt = chat_ids(tokenizer, messages).tolist()
        if positions is None or len(prompt) + max_new_tokens <= positions * _FULL:
            return messages, prompt
        while len(messages) > 1 and len(prompt) + max_new_tokens > positions * _KEPT:
            messages = messages[2:]
            prompt = chat_ids(tokenizer, messages).tolist()
        if len(prompt) + max_new_tokens > positions:
            raise ConfigError(
                f"the message's {len(prompt)} tokens and {max_new_tokens} new ones must fit the "
                f"model's {positions} positions. Shorten it, or index it as a document."
            )
        return messages, prompt

    def _scope(self, settings: dict[str, Any], in_prompt: list[str | None]) -> dict[str, Any]:
        """Return settings that leave documents out which the prompt has."""
        hidden = set(in_prompt) - {None}
        if not hidden:
            return settings
        chosen = settings.get("documents")
        names = self._memory.documents if chosen is None else chosen
        return {**settings, "documents": list(itertools.filterfalse(hidden.__contains__, names))}


class _Asking(StoppingCriteria):
    """Stops generating when somebody says so."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return for each sequence whether it ends here, (B,) bool."""
        return torch.full((len(input_ids),), self._should_stop(), device=input_ids.device)
