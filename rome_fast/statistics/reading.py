"""From texts to batches of token rows: always the same batches for the same texts, wherever reading begins.

The tokens of the corpus are parted into windows. The rows of a window are sorted by length and cut into batches, so
that hardly any padding is needed; nothing of it depends on time, on threads or on where an earlier run stopped.
"""

import dataclasses
import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import ArgumentError, RomeFastError, StatisticsError
from .corpus import MAX_CHARACTERS

Rows = list[list[int]]
_Item = TypeVar("_Item")

_WINDOW_BATCHES = 16
_TOKENISED_CHARACTERS = 1 << 18  # at once: a tokenizer wants many texts to spread over its threads
_AHEAD = 1  # windows made before they are wanted


@dataclass(frozen=True)
class Place:
    """Where in the corpus a window begins, and what came before it."""

    texts: int = 0  # done completely
    offset: int = 0  # tokens done of the next one
    tokens: int = 0
    batches: int = 0
    digest: str = hashlib.sha256().hexdigest()  # of the texts done completely


@dataclass(frozen=True)
class Window:
    """Rows of tokens in the order of the corpus, and where they begin."""

    start: Place
    rows: Rows

    @cached_property
    def digest(self) -> str:
        """Tells these rows from any others."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()

    def batches(self, most: int) -> list[Rows]:
        """The rows, longest first, in batches of at most `most` tokens with padding (a longer row stands alone)."""
        out: list[Rows] = []
        batch: Rows = []
        for row in sorted(self.rows, key=len, reverse=True):
            if batch:
                longest = len(batch[0])
                full = (len(batch) + 1) * longest > most
                # Between rows of different length a batch may end early, if it is of some size already.
                wasteful = 4 * len(row) < 3 * longest and 4 * len(batch) * longest >= most
                if full or wasteful:
                    out.append(batch)
                    batch = []
            batch.append(row)
        return [*out, batch]


@dataclass
class Reading:
    """What to read of which texts, and how."""

    tokenizer: PreTrainedTokenizerBase
    texts: Iterable[Any]
    field: str  # of texts that are mappings
    tokens: int  # to read at most
    length: int  # of a row at most
    batch_tokens: int
    # Of the texts read; complete when the windows are.
    corpus: "hashlib._Hash" = dataclasses.field(default_factory=hashlib.sha256)

    def windows(self, start: Place) -> Iterator[Window]:
        """The windows from `start` on.

        Raises ArgumentError for a text that is none, StatisticsError where the texts before `start` are others than
        they were.
        """
        texts = self._parts()
        self._skip(texts, start)
        place, rows, size = start, Rows(), 0
        number, offset, left = start.texts, start.offset, self.tokens - start.tokens
        while left and (group := self._group(texts, left)):
            for text, (ids, lead) in zip(group, _encode(self.tokenizer, group, number), strict=True):
                before = self.corpus.hexdigest()
                self._read(text, number)
                while offset < len(ids):
                    # A model that knows BOS has other keys without it, and is not asked or edited without it.
                    head = ids[:lead] if offset and lead < self.length else []
                    row = (head + ids[offset : offset + self.length - len(head)])[:left]
                    rows.append(row)
                    size += len(row)
                    left -= len(row)
                    offset += max(len(row) - len(head), 0)
                    if size >= _WINDOW_BATCHES * self.batch_tokens or not left:
                        window = Window(place, rows)
                        yield window
                        batches = place.batches + len(window.batches(self.batch_tokens))
                        place = Place(number, offset, place.tokens + size, batches, before)
                        rows, size = [], 0
                    if not left:
                        return
                number, offset = number + 1, 0
        if rows:
            yield Window(place, rows)
        if not place.tokens and not rows:
            raise StatisticsError(
                f"texts: got no tokens at all; give at least one text that is not empty ({number} texts were read)"
            )

    def _parts(self) -> Iterator[str]:
        """The texts, very long ones in parts."""
        for text in self._given():
            if isinstance(text, Mapping):
                text = text.get(self.field, text)
            if not isinstance(text, str):
                wanted = f"str, or a mapping with a {self.field!r} of type str"
                raise ArgumentError(f"texts: got an item of type {type(text).__name__}, wanted {wanted}")
            start = 0
            while len(text) - start > MAX_CHARACTERS:
                stop = start + MAX_CHARACTERS
                # Where words end, so that no token is cut.
                cut = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
                stop = cut if cut > start else stop
                yield text[start:stop]
                start = stop
            yield text[start:]

    def _given(self) -> Iterator[Any]:
        try:
            yield from self.texts
        except RomeFastError:
            raise
        # A data set raises nearly anything while it is read: errors of the network, of the hub, of file formats.
        except Exception as error:
            raise StatisticsError(
                f"texts: cannot be read on ({type(error).__name__}: {error}); with a folder to save in, the same "
                "command goes on from its last snapshot"
            ) from error

    def _skip(self, texts: Iterator[str], start: Place) -> None:
        for number in range(start.texts):
            text = next(texts, None)
            if text is None:
                break
            self._read(text, number)
        if self.corpus.hexdigest() != start.digest:
            raise other_texts()

    def _read(self, text: str, number: int) -> None:
        content = _bytes(text, number)
        # With its length, or the digest would not tell where one text ends and the next begins.
        self.corpus.update(len(content).to_bytes(8, "little") + content)

    def _group(self, texts: Iterator[str], left: int) -> list[str]:
        """Texts to tokenise together; not many more than needed, since a token takes about a character at least."""
        group: list[str] = []
        size = 0
        while size < min(left, _TOKENISED_CHARACTERS):
            text = next(texts, None)
            if text is None:
                break
            group.append(text)
            size += len(text) + 1
        return group


def other_texts() -> StatisticsError:
    """The error of a run that is resumed with texts that it did not begin with."""
    return StatisticsError(
        "texts: got others than when the run began that is to be resumed; give it the texts it began with, or another "
        "folder to begin anew in"
    )


def _bytes(text: str, number: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"texts: number {number + 1} (from 1) is no Unicode text (half a surrogate pair at character "
            f"{error.start}); decode it as UTF-8"
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], number: int) -> list[tuple[list[int], int]]:
    """Token ids of whole texts, without trailing special tokens, and how many special ones each begins with."""
    for index, text in enumerate(texts):
        _bytes(text, number + index)
    encoded = tokenizer(
        list(texts),
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    out = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(ids)
        while end and special[end - 1]:
            end -= 1
        lead = next((i for i, is_special in enumerate(special[:end]) if not is_special), 0)
        out.append((ids[:end], lead))
    return out


@contextmanager
def made_ahead(items: Iterator[_Item]) -> Iterator[Iterator[_Item]]:
    """The items, made in a background thread while earlier ones are used; its errors are raised here."""
    made: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: _Item | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                made.put((item, error), timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
        except BaseException as error:
            put(None, error)
        else:
            put(None, None)

    def taken() -> Iterator[_Item]:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    thread = threading.Thread(target=make, name="rome_fast reading", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stopped.set()
        thread.join()
