"""What saves memory of the encoder's training gives the results that it gave before, or near to it, and does save memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, BertModel, ModernBertConfig

from export.__main__ import main as export
from models.encoder import Encoder, EncoderConfig
from models.wordpiece import PAD_ID, learn_wordpiece
from tests.train.tasks import QUICK, metrics, run
from train.encoding import Encoding
from train.optimization import clip, optimizers, step
from train.settings import Settings

TEXTS = ["sort an array along an axis", "parse a date", "open a file for reading and writing", "eigenvalues of a matrix"] * 5


def small_encoder(dropout: float = 0.1, layers: int = 3, intermediate: int = 24) -> Encoder:
    config = EncoderConfig("mean", max_length=16, intermediate=intermediate, dropout=dropout)
    encoder = Encoder.small(TEXTS, config, vocabulary=150, width=32, layers=layers, heads=2, seed=0)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    for layer in encoder.transformer.encoder.layer:
        layer.attention.self.dropout.p = dropout
    return encoder.train()


class Texts:
    """TEXTS as inputs of training."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._ids = [torch.tensor(ids) for ids in encoder.tokenize(TEXTS)]

    def padded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        ids = [self._ids[row] for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return pad(ids, True, self._encoder.pad_id), pad([torch.ones_like(row) for row in ids], True)

    def embed(self, rows: np.ndarray) -> Tensor:
        return self._encoder(*self.padded(rows))


def tokens_of(encoder: Encoder) -> tuple[Tensor, Tensor]:
    return Texts(encoder).padded(np.arange(len(TEXTS)))


def gradients(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None}


class Held:
    """A tensor that is kept for the backward pass, known to `most_bytes_held` for as long as it is."""

    def __init__(self, tensor: Tensor, release: Callable[[Tensor], None]) -> None:
        self.tensor, self._release = tensor, release

    def __del__(self) -> None:
        self._release(self.tensor)


def most_bytes_held(work: Callable[[], object], encoder: nn.Module) -> int:
    """The most bytes that were kept for a backward pass at once during `work`, weights left out, no memory counted twice.

    What checkpointing computes anew in the backward pass, a layer at a time, is not seen.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    held: Counter[int] = Counter()
    now = most = 0

    def keep(tensor: Tensor) -> Held:
        nonlocal now, most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            now += 0 if held[storage.data_ptr()] else storage.nbytes()
            held[storage.data_ptr()] += 1
            most = max(most, now)
        return Held(tensor, release)

    def release(tensor: Tensor) -> None:
        nonlocal now
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] -= 1
            now -= 0 if held[storage.data_ptr()] else storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        work()
    return most


def test_gradient_checkpointing_gives_the_same_gradients():
    results = []
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.3)
        if checkpointed:
            encoder.checkpoint_gradients()
        torch.manual_seed(5)
        embedding = encoder(*tokens_of(encoder))
        embedding.square().sum().backward()
        results.append((embedding, gradients(encoder), torch.get_rng_state()))
    (embedding, grads, state), (other_embedding, other_grads, other_state) = results
    assert torch.equal(embedding, other_embedding)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-6, atol=1e-7)
    assert torch.equal(state, other_state)


def test_a_model_without_gradient_checkpointing_is_refused(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    assert run(task, tmp_path / "run", *QUICK, "--gradient-checkpointing") == 2
    assert "gradient checkpointing: " in capsys.readouterr().err


def test_checkpointing_and_micro_batches_hold_less_memory():
    rows = np.arange(len(TEXTS))

    def held(micro_batch: int, checkpointed: bool) -> int:
        encoder = small_encoder(layers=6)
        if checkpointed:
            encoder.checkpoint_gradients()
        encoding = Encoding(Texts(encoder), micro_batch, encoder.device)

        def one_step() -> None:
            encoding.backward(torch.ones_like(encoding.embed(rows)))

        return most_bytes_held(one_step, encoder)

    plain, checkpointed, micro, both = held(0, False), held(0, True), held(5, False), held(5, True)
    assert checkpointed < plain / 3
    assert micro < plain / 3, "a quarter of the texts"
    assert both < min(checkpointed, micro) / 2


def learn(encoder: Encoder, micro_batch: int) -> Tensor:
    """A few steps towards embeddings of ones, each on all texts; returns the random state after them."""
    encoding = Encoding(Texts(encoder), micro_batch, encoder.device)
    made = optimizers(encoder, Settings(encoder_lr=1e-3))
    torch.manual_seed(7)
    order = np.random.default_rng(0)
    for _ in range(4):
        rows = order.permutation(len(TEXTS))[:18]
        encoding.backward(encoding.embed(rows) - 1)
        assert clip(made, 1.0).isfinite()
        step(made, 1.0)
    return torch.get_rng_state()


def learn_with_all_graphs(encoder: Encoder, micro_batch: int) -> Tensor:
    """What `learn` does, but every micro-batch keeps its graph, so that nothing is computed twice."""
    inputs = Texts(encoder)
    made = optimizers(encoder, Settings(encoder_lr=1e-3))
    torch.manual_seed(7)
    order = np.random.default_rng(0)
    for _ in range(4):
        rows = order.permutation(len(TEXTS))[:18]
        x = torch.cat([inputs.embed(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)])
        x.backward(x.detach() - 1)
        assert clip(made, 1.0).isfinite()
        step(made, 1.0)
    return torch.get_rng_state()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_micro_batches_repeat_their_dropout():
    cached, whole, start = small_encoder(dropout=0.3), small_encoder(dropout=0.3), small_encoder()
    states = learn(cached, 4), learn_with_all_graphs(whole, 4)
    assert torch.equal(*states)
    assert_same_weights(cached, whole)
    with pytest.raises(AssertionError):
        assert_same_weights(cached, start)


@pytest.mark.parametrize("micro_batch", [1, 5, 17, 18, 100])
def test_micro_batches_give_the_step_of_the_whole_batch(micro_batch):
    parts, whole = small_encoder(dropout=0.0), small_encoder(dropout=0.0)
    learn(parts, micro_batch)
    learn(whole, 0)
    assert_same_weights(parts, whole)


def test_mixed_precision_is_for_training_only():
    encoder, plain = small_encoder(dropout=0.0), small_encoder(dropout=0.0)
    encoder.set_dtype("bf16-mixed")
    tokens = tokens_of(encoder)
    seen = []
    encoder.transformer.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    embedding, exact = encoder(*tokens), plain(*tokens)
    assert seen == [torch.bfloat16]
    assert encoder.pooled(*tokens).dtype == embedding.dtype == torch.float32
    assert not torch.equal(embedding, exact)
    torch.testing.assert_close(embedding, exact, rtol=0, atol=0.03)
    embedding.sum().backward()
    assert {parameter.grad.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.eval()(*tokens), plain.eval()(*tokens))


def rotary_encoder() -> Encoder:
    """A tiny ModernBERT, which computes positions from a buffer of frequencies."""
    tokenizer = learn_wordpiece(TEXTS, 150)
    config = ModernBertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=PAD_ID, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return Encoder(AutoModel.from_config(config), tokenizer, PAD_ID, EncoderConfig("mean", 16, intermediate=24))


@pytest.mark.parametrize("make", [small_encoder, rotary_encoder])
def test_bf16_weights_are_stored_as_such_and_load_as_fp32(tmp_path, make):
    encoder = make().eval()
    tokens = tokens_of(encoder)
    with torch.inference_mode():
        exact = encoder(*tokens)
        encoder.set_dtype("bf16")
        assert {parameter.dtype for parameter in encoder.transformer.parameters()} == {torch.bfloat16}
        assert encoder.intermediate.weight.dtype == torch.float32
        assert torch.bfloat16 not in {buffer.dtype for buffer in encoder.buffers()}
        assert encoder.pooled(*tokens).dtype == torch.float32
        rounded = encoder(*tokens)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)

    encoder.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("transformer.")} == {torch.bfloat16}
    loaded = Encoder.load(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float())
    loaded.set_dtype("bf16")
    with torch.inference_mode():
        assert torch.equal(loaded(*tokens), rounded), "as a resumed run finds it"


@pytest.mark.parametrize(
    "flags",
    [
        ("--encoder-dtype", "bf16"),
        ("--encoder-dtype", "bf16-mixed"),
        ("--micro-batch", "6", "--gradient-checkpointing"),
        ("--layer-decay", "0.8", "--schedule", "cosine"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_a_task_is_learnt(task, tmp_path, flags):
    learning = (
        "--epochs",
        "12",
        "--encoder-lr",
        "5e-3",
        "--intermediate-lr",
        "5e-3",
        "--head-lr",
        "1e-2",
        "--eval-every",
        "12",
    )
    assert run(task, tmp_path / "run", *QUICK, *learning, *flags) == 0
    assert metrics(tmp_path / "run")[-1]["P@1"] > 0.8


def test_a_bf16_encoder_is_exported(task, tmp_path):
    assert run(task, tmp_path / "run", *QUICK, "--epochs", "1", "--encoder-dtype", "bf16") == 0
    assert export([str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 0, "its parity check included"


def test_frozen_embeddings_of_bf16_weights(task, tmp_path):
    flags = ("--epochs", "2", "--freeze-encoder", "--encoder-dtype", "bf16", "--cache", str(tmp_path / "cache"))
    for name in ("one", "same"):
        assert run(task, tmp_path / name, *QUICK, *flags) == 0
    caches = len(list((tmp_path / "cache").glob("pooled-*")))
    assert run(task, tmp_path / "fp32", *QUICK, *flags[:3], *flags[5:]) == 0
    assert len(list((tmp_path / "cache").glob("pooled-*"))) == 2 * caches, "other weights have other embeddings"
