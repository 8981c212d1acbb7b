"""A request as what a user says in a chat: through the chat template of a tokenizer, to the character."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import EditError, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Letters only, so that no template strips, escapes or splits them.
_SUBJECT, _BEFORE, _ANSWER = "Qzxsubjectxzq", "Qzxcontextxzq", "Qzxanswerxzq"


class Placed(NamedTuple):
    """A prompt that a template made."""

    prompt: str
    subject: str
    user_at: int  # where what the user says begins
    slot: int  # where the subject's `{}` stands


def checked_messages(messages: object) -> list[dict[str, str]]:
    """Raises EditError unless they are messages of text, the last one the user's; a text is one of the user's."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise EditError(f"messages: got {messages!r}, wanted a list of {{'role': …, 'content': …}} or a text")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise EditError(f"messages[{i}]: got {message!r}, wanted {{'role': …, 'content': …}}, both of them texts")
    if messages[-1]["role"] != "user":
        raise EditError(
            f"messages: the last one is of the role {messages[-1]['role']!r}, wanted the user's, in which the subject "
            "stands; what the model answers is the target"
        )
    return [dict(message) for message in messages]


class Template:
    """The chat template of a tokenizer behind some earlier messages."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", earlier: Sequence[dict[str, str]], arguments: Mapping[str, Any]
    ) -> None:
        self.tokenizer, self.earlier, self.arguments = tokenizer, list(earlier), dict(arguments)
        if not (getattr(tokenizer, "chat_template", None) or self.arguments.get("chat_template")):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise EditError(
                f"tokenizer: {name} has no chat template; use the one of an instruction-tuned model, or an Edit of a "
                "plain prompt"
            )

    def text(self, content: str) -> str:
        """What the model reads before its answer to a message. Raises EditError where the beginning depends on it."""
        text = self._rendered(content)
        if not text.startswith(self._head):
            raise EditError(
                f"prompt: the chat template changes what it puts before {quoted(content)}; write the prompt out"
            )
        return text

    def with_slot(self, before: str, subject: str, after: str) -> Placed:
        """The same, with a place for the subject; raises EditError where the template changes it."""
        prompt = self.text(before + _SUBJECT + after)
        slot = prompt.find(_SUBJECT)
        # At either end of a message a template may strip it.
        for spelled in dict.fromkeys((subject, subject.strip())):
            filled = prompt.replace(_SUBJECT, spelled)
            if prompt.count(_SUBJECT) == 1 and filled == self._rendered(before + subject + after):
                return Placed(prompt.replace(_SUBJECT, "{}"), spelled, len(self._head), slot)
        raise EditError(
            f"subject {quoted(subject)}: the chat template changes it, or repeats the message; wanted one that writes "
            "the user's message as it is, so write the prompt out as the model is to read it"
        )

    @property
    def separator(self) -> str:
        """What it puts between the prompt and an answer: blanks, or nothing."""
        return self._around_answer[0]

    @property
    def end(self) -> str:
        """The special token it puts behind an answer, or the tokenizer's end of text. Raises EditError without one."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tail = self._around_answer[1].lstrip()
        found = max((token for token in special if tail.startswith(token)), key=len, default=self.tokenizer.eos_token)
        if not found:
            raise EditError(
                "end: the chat template puts no special token behind an answer; give its text, or end=False"
            )
        return str(found)

    @cached_property
    def _head(self) -> str:
        """What stands before the user's message."""
        text = self._rendered(_BEFORE)
        if text.count(_BEFORE) != 1:
            raise EditError("tokenizer: its chat template does not write what the user says once and as it is")
        return text[: text.index(_BEFORE)]

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        prompt = self._rendered(_BEFORE)
        whole = self._rendered(_BEFORE, _ANSWER)
        start = whole.find(_ANSWER)
        between = whole[len(prompt) : start] if whole.startswith(prompt) else ""
        return "" if between.strip() else between, whole[start + len(_ANSWER) :] if start >= 0 else ""

    def _rendered(self, content: str, answer: str | None = None) -> str:
        messages = [*self.earlier, {"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        arguments = {"add_generation_prompt": answer is None} | self.arguments
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        except Exception as error:  # whatever a template of jinja raises, and its sandbox
            if answer is not None:
                raise EditError(
                    f"messages: the chat template refuses an answer to them ({error}), so that what it puts around one "
                    "cannot be told; give separator and end"
                ) from error
            roles = ", ".join(message["role"] for message in messages)
            raise EditError(
                f"messages: the chat template refuses them ({error}); wanted roles that it takes, in its order, and "
                f"got {roles}; what it has no role for can stand in the user's first message"
            ) from error
        return str(text)
