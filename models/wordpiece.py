"""A WordPiece tokenizer learned from texts, for encoders trained from scratch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

PAD, UNK, CLS, SEP = SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_CHARACTERS = 1_000  # the rest of a text's characters are rare enough to be unknown
# Names in code: splits parseJson and HTTPServer, leaves GPUs and NaN-like plurals of capitals whole.
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
    tokenizer = _pipeline(Tokenizer(WordPiece(unk_token=UNK)))
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    by_frequency = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    characters = sorted(by_frequency[: min(_CHARACTERS, vocabulary // 4)])  # two tokens each: at most half of the vocabulary
    if not characters:
        raise ValueError("the texts to learn a vocabulary from are empty")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        limit_alphabet=0,  # only the characters chosen here
        special_tokens=[*SPECIAL, *characters, *(f"##{c}" for c in characters)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # The trainer declares its whole start vocabulary special; a new tokenizer takes the vocabulary alone.
    learned = _pipeline(Tokenizer(WordPiece(tokenizer.get_vocab(), unk_token=UNK)))
    learned.add_special_tokens(list(SPECIAL))
    ends = [(token, learned.token_to_id(token)) for token in (CLS, SEP)]
    learned.post_processor = processors.TemplateProcessing(single=f"{CLS} $A {SEP}", special_tokens=ends)
    learned.decoder = decoders.WordPiece()
    return learned


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
