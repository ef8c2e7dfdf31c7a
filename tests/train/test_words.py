"""Which tokens a text has, and how much each of them says."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.bag_of_words import BagOfWords, BagOfWordsConfig
from train.tokens import Split
from train.words import inverse_document_frequencies, presence, weigh

VOCABULARY, WIDTH = 12, 400
TEXTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=6), min_size=1, max_size=9)


def fresh_bag() -> BagOfWords:
    torch.manual_seed(0)
    return BagOfWords(BagOfWordsConfig(vocab_size=VOCABULARY, hidden_size=WIDTH)).eval()


@given(TEXTS)
def test_a_token_counts_once_a_text(texts: list[list[int]]) -> None:
    split = Split.of_tokens(texts)
    expected = [[float(token in text) for token in range(VOCABULARY)] for text in texts]
    np.testing.assert_array_equal(presence(split.tokens, split.token_starts, VOCABULARY).todense(), expected)


@given(TEXTS)
def test_rare_tokens_say_more_than_frequent_ones(texts: list[list[int]]) -> None:
    split = Split.of_tokens(texts)
    weights = inverse_document_frequencies(presence(split.tokens, split.token_starts, VOCABULARY))
    for token, weight in enumerate(weights):
        seen = sum(token in text for text in texts)
        np.testing.assert_allclose(weight, np.log(len(texts) / seen) if seen else 0, rtol=1e-6)


def test_fresh_word_vectors_are_as_long_as_their_words_say_much() -> None:
    """Token 0 is in all texts, 1 in half of them, 2 and 3 in one each, the others in none."""
    split = Split.of_tokens([[0, 1, 2], [0, 1, 1, 3], [0], [0]])
    bag, before = fresh_bag(), fresh_bag().words.weight
    weigh(bag, split)
    lengths = (bag.words.weight.norm(dim=1) / before.norm(dim=1)).detach().numpy()
    np.testing.assert_allclose(lengths[2] / lengths[1], np.log(4) / np.log(2), rtol=1e-5)
    assert lengths[0] == 0
    assert not lengths[4:].any()
    once_a_text = [0, 0, 0, 0, 1, 1, 2, 3]
    np.testing.assert_allclose(np.square(lengths[once_a_text]).mean(), 1, rtol=1e-5)


def test_a_shared_rare_word_makes_texts_more_alike_than_a_shared_frequent_one() -> None:
    texts = [[0, 1], [0, 2], [0, 3], [4, 5], [4, 6], [0, 7], [0, 8]]
    split = Split.of_tokens(texts)
    bag = fresh_bag()
    weigh(bag, split)
    with torch.no_grad():
        x = torch.cat([bag(torch.tensor([text]), torch.ones(1, 2)).last_hidden_state.mean(dim=1) for text in texts])
    alike = torch.nn.functional.cosine_similarity
    assert alike(x[3], x[4], dim=0) > 1.5 * alike(x[0], x[1], dim=0)


def test_texts_that_are_all_alike_leave_the_vectors_as_they_were() -> None:
    for texts in ([[0, 1], [0, 1]], [[], []]):
        bag = fresh_bag()
        weigh(bag, Split.of_tokens(texts))
        torch.testing.assert_close(bag.words.weight, fresh_bag().words.weight, rtol=0, atol=0)
