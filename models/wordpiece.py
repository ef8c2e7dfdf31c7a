"""A WordPiece tokenizer learned from texts, for encoders trained from scratch."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # ids 0 to 3
PAD_ID = 0
_CHARACTERS = 1_000  # the most frequent ones; a word with any other is unknown
_ENOUGH = 50_000_000  # characters; more text would hardly change the vocabulary
# Names in code: splits parseJson and HTTPServer, leaves GPUs whole.
_CASE_CHANGE = r"(?<=\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll}{2})"


def learn_wordpiece(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens: [CLS] text [SEP], neither padded nor truncated.

    Words end at white space, punctuation (dots and underscores too) and changes of case; then case is dropped. Accents stay:
    in many languages they make another word. The same texts give the same ids: the library's trainer numbers continuing
    characters in hash order and lets these numbers decide ties (tokenizers issue 1794), so they are numbered beforehand.
    ValueError when the texts hold no word or the vocabulary is too small.
    """
    if vocabulary < 100:
        raise ValueError(f"vocabulary is {vocabulary}, must be at least 100")
    texts = texts[:: 1 + sum(map(len, texts)) // _ENOUGH]
    tokenizer = _pipeline(Tokenizer(WordPiece(unk_token="[UNK]")))
    characters = _characters(texts, tokenizer.normalizer, min(_CHARACTERS, vocabulary // 4))  # two tokens each: at most half
    if not characters:
        raise ValueError("the texts to learn a vocabulary from are empty")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        limit_alphabet=0,  # only the characters chosen here
        special_tokens=[*_SPECIAL, *characters, *(f"##{c}" for c in characters)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # The trainer declares its whole start vocabulary special; a new tokenizer takes the vocabulary alone.
    learned = _pipeline(Tokenizer(WordPiece(tokenizer.get_vocab(), unk_token="[UNK]")))
    learned.add_special_tokens(list(_SPECIAL))
    learned.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return learned


def _characters(texts: Sequence[str], normalizer: normalizers.Normalizer, limit: int) -> list[str]:
    """The `limit` most frequent characters of the normalized texts, in code order."""
    written: Counter[str] = Counter()
    for text in texts:
        written.update(unicodedata.normalize("NFC", text))
    counts: Counter[str] = Counter()
    for character, count in written.items():  # normalizing each character once is much quicker than all of the text
        for c in normalizer.normalize_str(character).strip():
            counts[c] += count
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:limit])


def _pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(_CASE_CHANGE), " "),
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
