"""Text → token ids, with Hugging Face tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Its thread pool counts the host's cores, whatever the cgroup allows, and single texts gain nothing from it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Encoding, Tokenizer

# Tokenizing takes under 1 µs per character, so up to this many take less than what is spent on handing them to a thread.
SHORT_CHARS = 1000
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized text: the ids that fit the model, and whether some did not."""

    ids: list[int]
    truncated: bool


class TextTokenizer:
    """The tokenizer of a bundle, cutting texts to the model's length. One instance per thread, its settings made once:
    changing them while another thread encodes raises "Already borrowed".

    pad_id   what the model was trained to see as padding
    """

    def __init__(self, file: Path, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(file))
        self.pad_id: int = (self._tokenizer.padding or {"pad_id": 0})["pad_id"]
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._first_look_chars = _CHARS_PER_TOKEN * max_length

    def __call__(self, texts: Iterable[str]) -> list[Tokens]:
        """Lets go of the GIL unless texts are short. They must be valid Unicode (no half surrogate pairs)."""
        return [Tokens(encoding.ids, bool(encoding.overflowing)) for encoding in map(self._encode, texts)]

    def _encode(self, text: str) -> Encoding:
        # Of a book only its first page is read. Tokens depend on nothing beyond the next space, so a start that overflows
        # the model's length, and ends at a space, has the same first tokens as the whole.
        chars = self._first_look_chars
        while chars < len(text):
            start = self._encode_whole(text[: max(0, text.rfind(" ", 0, chars))])
            if start.overflowing:
                return start
            chars *= 4
        return self._encode_whole(text)

    def _encode_whole(self, text: str) -> Encoding:
        if len(text) <= SHORT_CHARS:
            return self._tokenizer.encode(text)  # keeps the GIL: giving it away would take longer
        return self._tokenizer.encode_batch_fast([text])[0]
