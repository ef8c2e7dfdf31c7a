"""models.encoder and models.wordpiece: pooling, tokens, learning from scratch, files and errors."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
)

from models.bag_of_words import BagOfWords, BagOfWordsConfig
from models.encoder import Encoder, EncoderConfig, EncoderError, Pooling
from models.wordpiece import learn_wordpiece

TEXTS = [
    "numpy.linalg.svd computes the singular value decomposition of an array",
    "numpy.sort returns a sorted copy of an array along an axis",
    "os.path.join joins one or more path segments",
    "Käännä näppäintä oikealle, Überprüfung der Größe, déjà vu",
    "HTTPServer and parseJson are names with changes of case",
] * 4


def small(texts: list[str] = TEXTS, *, seed: int = 0, **config: object) -> Encoder:
    settings = EncoderConfig(**{"pooling": "mean", "max_length": 32} | config)
    return Encoder.small(texts, settings, vocabulary=400, width=32, layers=2, heads=2, seed=seed)


def batch(encoder: Encoder, texts: list[str], *, length: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask int64 [B, S], padded to the longest text or to `length`."""
    rows = encoder.tokenize(texts)
    longest = max(length, *(len(row) for row in rows))
    ids = torch.full((len(rows), longest), encoder.pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


class Doubling(nn.Module):
    """Stands in for a transformer: token t becomes the vector [t, 2t]."""

    config = SimpleNamespace(hidden_size=2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, 2 * input_ids], dim=2).double())


@pytest.mark.parametrize(
    ("pooling", "expected"), [("cls", [[5, 10], [8, 16]]), ("mean", [[7, 14], [8, 16]]), ("last", [[9, 18], [8, 16]])]
)
def test_pooling_by_hand(pooling: str, expected: list[list[float]]) -> None:
    encoder = Encoder(Doubling(), learn_wordpiece(TEXTS, 400), 0, EncoderConfig(pooling, 8))
    pooled = encoder.pooled(torch.tensor([[5, 7, 9, 3], [8, 3, 3, 3]]), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == expected


def test_last_token_is_found_behind_padding_on_the_left() -> None:
    encoder = Encoder(Doubling(), learn_wordpiece(TEXTS, 400), 0, EncoderConfig("last", 8))
    assert encoder.pooled(torch.tensor([[3, 3, 7, 9]]), torch.tensor([[0, 0, 1, 1]])).tolist() == [[9, 18]]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_changes_nothing(pooling: str) -> None:
    encoder = small(pooling=pooling)
    texts = ["sort", TEXTS[0], "numpy.sort along an axis", ""]
    together = encoder(*batch(encoder, texts, length=32))
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(row, encoder(*batch(encoder, [text]))[0], rtol=1e-5, atol=1e-5)


def test_pretrained_encoder_knows_what_texts_mean(minilm_path: Path) -> None:
    encoder = Encoder.pretrained(minilm_path, EncoderConfig("mean", 128))
    assert (encoder.embedding_width, encoder.width, encoder.training) == (384, 384, False)
    texts = ["The kitten sleeps on the sofa.", "A cat is napping on the couch.", "Interest rates rose again in March."]
    with torch.no_grad():
        embeddings = encoder(*batch(encoder, texts, length=40))
        alone = encoder(*batch(encoder, texts[:1]))[0]
    torch.testing.assert_close(embeddings[0], alone, rtol=1e-4, atol=1e-5)
    cat, couch, rates = nn.functional.normalize(embeddings, dim=1)
    assert cat @ couch > 0.5 > 0.2 > cat @ rates


def test_tokens_are_those_of_the_models_own_tokenizer(minilm_path: Path) -> None:
    encoder = Encoder.pretrained(minilm_path, EncoderConfig("mean", 16))
    texts = [*TEXTS[:5], "", "word " * 50, "one two three four five six seven eight nine ten a b c d"]
    own = AutoTokenizer.from_pretrained(minilm_path)
    assert encoder.tokenize(texts) == own(texts, truncation=True, max_length=16)["input_ids"]
    assert len(encoder.tokenizer.encode("word " * 50).ids) == 52  # callers decide about truncation and padding
    assert encoder.tokenizer.padding is None


def test_tokenize_keeps_the_special_tokens_of_a_cut_text() -> None:
    encoder = small(max_length=6)
    cls, sep = (encoder.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    short, long, empty = encoder.tokenize(["sort", TEXTS[0], ""])
    assert short[0] == long[0] == cls
    assert short[-1] == long[-1] == sep
    assert (len(long), empty) == (6, [cls, sep])


def test_learned_vocabulary_splits_identifiers() -> None:
    tokenizer = learn_wordpiece(TEXTS, 400)
    words = [
        word
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("numpy.linalg.svd to_csv"))
    ]
    assert words == ["numpy", ".", "linalg", ".", "svd", "to", "_", "csv"]
    assert tokenizer.encode("numpy.linalg.svd").tokens == ["[CLS]", "numpy", ".", "linalg", ".", "svd", "[SEP]"]
    assert tokenizer.encode("HTTPServer parseJson").tokens == tokenizer.encode("http server parse json").tokens
    assert tokenizer.normalizer.normalize_str("GPUs") == "gpus"


def test_learned_vocabulary_keeps_accents_and_drops_case() -> None:
    tokenizer = learn_wordpiece(TEXTS, 400)
    assert tokenizer.encode("NÄPPÄINTÄ").tokens == tokenizer.encode("näppäintä").tokens
    assert tokenizer.encode("na\u0308ppa\u0308inta\u0308").ids == tokenizer.encode("näppäintä").ids
    assert tokenizer.encode("nappainta").ids != tokenizer.encode("näppäintä").ids
    assert "[UNK]" not in tokenizer.encode("Größe déjà").tokens


def test_learned_vocabulary_is_the_same_every_time() -> None:
    # Every pair of letters is equally frequent here, so only the order of ids decides which are merged.
    texts = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"] * 2
    first = learn_wordpiece(texts, 100).to_str()
    assert all(learn_wordpiece(texts, 100).to_str() == first for _ in range(5))


def test_small_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = small(seed=3, intermediate=8), small(seed=3, intermediate=8), small(seed=4, intermediate=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.tokenizer.to_str() == same.tokenizer.to_str()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.intermediate.weight, other.intermediate.weight)


def test_small_learns_from_scratch() -> None:
    torch.manual_seed(0)
    texts = [
        f"{verb} an {thing} along the {place}"
        for verb in ("sort", "join")
        for thing in ("array", "axis")
        for place in ("path", "copy")
    ]
    target = torch.tensor([text.startswith("sort") for text in texts]).float()
    encoder = small(intermediate=16, dropout=0.1).train()
    head = nn.Linear(encoder.width, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    ids, mask = batch(encoder, texts)
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(head(encoder(ids, mask))[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    scores = head(encoder.eval()(ids, mask))[:, 0]
    assert ((scores > 0) == target.bool()).all()


def test_project_is_dropout_then_relu_layer_then_dropout() -> None:
    encoder = small(intermediate=24, dropout=0.5, intermediate_dropout=0.75)
    assert (encoder.embedding_width, encoder.width) == (32, 24)
    pooled = torch.randn(64, 32)
    expected = torch.relu(pooled @ encoder.intermediate.weight.T + encoder.intermediate.bias)
    torch.testing.assert_close(encoder.project(pooled), expected)
    plain = small(dropout=0.5).train()
    dropped = plain.project(torch.ones(64, 32))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    layered = small(intermediate=24, intermediate_dropout=0.75).train()
    whole, dropped = layered.eval().project(pooled), layered.train().project(pooled)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 4 * whole[kept])
    assert 0.2 < kept.sum() / (whole != 0).sum() < 0.3


@pytest.mark.parametrize(
    "config", [{"pooling": "cls"}, {"pooling": "last", "intermediate": 40, "dropout": 0.25, "intermediate_dropout": 0.5}]
)
def test_save_and_load_bit_for_bit(tmp_path: Path, config: dict[str, object]) -> None:
    encoder = small(**config)
    encoder.save(tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == [
        "config.json", "encoder.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    before = torch.get_rng_state()
    loaded = Encoder.load(tmp_path / "encoder")
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.config, loaded.pad_id, loaded.width) == (encoder.config, encoder.pad_id, encoder.width)
    assert loaded.tokenize(TEXTS) == encoder.tokenize(TEXTS)
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, weight in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(*batch(loaded, TEXTS)), encoder(*batch(encoder, TEXTS)))
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "encoder").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_save_and_load_a_pretrained_encoder(tmp_path: Path, minilm_path: Path) -> None:
    encoder = Encoder.pretrained(minilm_path, EncoderConfig("mean", 64))
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert not any("pooler" in name for name in loaded.state_dict())
    assert torch.equal(loaded(*batch(loaded, TEXTS)), encoder(*batch(encoder, TEXTS)))


@pytest.mark.parametrize("name", ["config.json", "encoder.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_load_names_the_file_at_fault(tmp_path: Path, name: str, damage: str) -> None:
    small().save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EncoderError, match=f"{name}: " + ("missing" if damage == "missing" else "")):
        Encoder.load(tmp_path)


def test_load_refuses_settings_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    small(intermediate=16).save(tmp_path)
    path = tmp_path / "encoder.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"intermediate": 24}))
    with pytest.raises(EncoderError, match=r"model\.safetensors: .*intermediate"):
        Encoder.load(tmp_path)
    path.write_text(json.dumps(settings | {"max_length": 5000}))
    with pytest.raises(EncoderError, match=r"max_length is 5000, the model has 32 positions"):
        Encoder.load(tmp_path)
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pooling"}))
    with pytest.raises(EncoderError, match=r"encoder\.json: KeyError: 'pooling'"):
        Encoder.load(tmp_path)
    path.write_text(json.dumps(settings))
    learn_wordpiece([*TEXTS, *("".join(chr(97 + (i * j) % 26) for j in range(9)) for i in range(2000))], 900).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(EncoderError, match=r"the tokenizer has \d+ tokens, the model embeds \d+"):
        Encoder.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max', not one of cls, mean, last"),
        ({"max_length": 0}, "max_length is 0"),
        ({"intermediate": 65_537}, "intermediate is 65537, must be 0 .none. to 65536"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"intermediate_dropout": -0.1}, "intermediate_dropout is -0.1"),
    ],
)
def test_config_errors(config: dict[str, object], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        EncoderConfig(**{"pooling": "mean", "max_length": 8} | config)


def test_small_errors() -> None:
    config = EncoderConfig("mean", 8)
    with pytest.raises(EncoderError, match="texts to learn a vocabulary from are empty"):
        Encoder.small([" ", ""], config, seed=0)
    with pytest.raises(EncoderError, match="width is 30, must be a multiple of the 4 heads"):
        Encoder.small(TEXTS, config, width=30, seed=0)
    with pytest.raises(EncoderError, match="layers is -1"):
        Encoder.small(TEXTS, config, layers=-1, seed=0)
    with pytest.raises(EncoderError, match="vocabulary is 3"):
        Encoder.small(TEXTS, config, vocabulary=3, seed=0)
    with pytest.raises(EncoderError, match="max_length is 2, but 2 of them are special tokens"):
        small(max_length=2)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-group/no-such-model"])
def test_pretrained_names_what_cannot_be_loaded(name: str) -> None:
    with pytest.raises(EncoderError, match=f"{name}: no such folder, and the Hugging Face hub gives no model"):
        Encoder.pretrained(name, EncoderConfig("mean", 8))


def test_pretrained_refuses_positions_the_model_has_not(tmp_path: Path, minilm_path: Path) -> None:
    with pytest.raises(EncoderError, match="max_length is 513, the model has 512 positions"):
        Encoder.pretrained(minilm_path, EncoderConfig("mean", 513))
    # RoBERTa's first positions are never used: a table of 34 holds 32 tokens.
    shape = RobertaConfig(
        vocab_size=30_522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(shape).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_path / name, tmp_path)
    with pytest.raises(EncoderError, match="max_length is 33, the model has 32 positions"):
        Encoder.pretrained(tmp_path, EncoderConfig("mean", 33))
    encoder = Encoder.pretrained(tmp_path, EncoderConfig("mean", 32))
    assert encoder(*batch(encoder, ["word " * 50])).shape == (1, 16)


def test_pretrained_refuses_a_folder_without_tokenizer_or_weights(tmp_path: Path) -> None:
    shape = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(shape).save_pretrained(tmp_path / "bare")
    with pytest.raises(EncoderError, match="bare: this folder gives no tokenizer"):
        Encoder.pretrained(tmp_path / "bare", EncoderConfig("mean", 8))
    small().save(tmp_path / "ours")
    with pytest.raises(EncoderError, match=r"ours: \d+ weights are missing"):
        Encoder.pretrained(tmp_path / "ours", EncoderConfig("mean", 8))
    with pytest.raises(EncoderError, match="this folder gives no model"):
        Encoder.pretrained(tmp_path, EncoderConfig("mean", 8))


def test_pretrained_needs_a_fast_tokenizer(tmp_path: Path) -> None:
    shape = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(shape).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="has no fast tokenizer, only ByT5Tokenizer"):
        Encoder.pretrained(tmp_path, EncoderConfig("mean", 8))


def test_pretrained_refuses_an_encoder_decoder(tmp_path: Path) -> None:
    T5Model(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is an encoder-decoder"):
        Encoder.pretrained(tmp_path, EncoderConfig("mean", 8))


def test_without_layers_it_is_a_bag_of_words() -> None:
    """A text's embedding is the normalized mean of one vector for each token; training moves those of its own tokens alone."""
    config = EncoderConfig(pooling="mean", max_length=16)
    encoder = Encoder.small(TEXTS, config, vocabulary=400, width=32, layers=0, seed=0)
    ids = torch.tensor(encoder.tokenize(TEXTS[:1]))
    words = encoder.transformer.words.weight
    expected = torch.nn.functional.layer_norm(words[ids].mean(dim=1), (32,), eps=1e-6)
    embedding = encoder(ids, torch.ones_like(ids))
    torch.testing.assert_close(embedding, expected)
    torch.testing.assert_close(encoder(ids.flip(1), torch.ones_like(ids)), expected)
    embedding[:, 0].sum().backward()
    moved = words.grad.abs().sum(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == set(ids.flatten().tolist())


@pytest.mark.parametrize("sparse", [False, True])
def test_the_mean_of_a_bag_is_that_of_its_hidden_states(sparse: bool) -> None:
    """Embeddings and gradients, of padded texts, of words that several texts have and one text twice, and of an empty text."""
    torch.manual_seed(0)
    bag = BagOfWords(BagOfWordsConfig(vocab_size=12, hidden_size=32))
    bag.words.sparse = sparse
    ids = torch.randint(1, 12, (6, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [1], [4], [0], [7], [9]])).long()
    grad = torch.randn(6, 32)

    def of_hidden_states(model: BagOfWords, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model(ids * mask, mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return mean, torch.autograd.grad(mean, model.words.weight, grad)[0].to_dense()

    mean = bag.mean(ids * mask, mask)
    words_grad = torch.autograd.grad(mean, bag.words.weight, grad)[0]
    assert words_grad.is_sparse == sparse
    plain = of_hidden_states(bag, grad)
    truth = of_hidden_states(copy.deepcopy(bag).double(), grad.double())
    for ours, reference, exact in zip((mean, words_grad.to_dense()), plain, truth, strict=True):
        assert (ours - exact).abs().max() <= 2 * (reference - exact).abs().max() + 1e-7 * exact.abs().max()


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_a_bag_of_words_refuses_to_look_at_one_token(pooling: Pooling) -> None:
    with pytest.raises(EncoderError, match="a bag of words has no order"):
        Encoder.small(TEXTS, EncoderConfig(pooling, 16), vocabulary=400, width=32, layers=0, seed=0)
