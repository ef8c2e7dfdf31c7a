import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from models.encoder import Encoder, EncoderConfig
from train.optimization import clip, layers_below_top, optimizers, schedule, state_tensors, step
from train.settings import Settings, SettingsError

TEXTS = ["sort an array along an axis", "parse a date from a string", "open a file for reading"]
SMALL = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def small_encoder(layers: int = 2, intermediate: int = 8) -> Encoder:
    config = EncoderConfig("mean", max_length=12, intermediate=intermediate)
    return Encoder.small(TEXTS, config, vocabulary=120, width=16, layers=layers, heads=2, seed=0)


def groups(made: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in made for group in optimizer.param_groups]


def peak_lrs(made: list[torch.optim.Optimizer]) -> dict[int, float]:
    return {id(parameter): group["peak_lr"] for group in groups(made) for parameter in group["params"]}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_schedule_rises_then_falls_to_zero(kind, warmup):
    factors = [schedule(i, 200, warmup, kind) for i in range(200)]
    rise = round(200 * warmup)
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    decay = factors[rise:]
    assert decay == sorted(decay, reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    if decay:
        assert decay[0] == 1
        assert decay[-1] < 0.01
        middle = decay[len(decay) // 2]
        assert middle == pytest.approx(0.5)
        quarter = (1 + math.cos(math.pi / 4)) / 2 if kind == "cosine" else 0.75
        assert decay[len(decay) // 4] == pytest.approx(quarter)


@pytest.mark.parametrize(
    ("config", "embeddings", "layer", "last"),
    [
        (BertConfig(**SMALL), "embeddings.word_embeddings.weight", "encoder.layer.{}.output.dense.weight", None),
        (RobertaConfig(**SMALL), "embeddings.position_embeddings.weight", "encoder.layer.{}.output.dense.bias", None),
        (
            DistilBertConfig(vocab_size=100, dim=16, n_layers=3, n_heads=2, hidden_dim=32),
            "embeddings.LayerNorm.weight",
            "transformer.layer.{}.ffn.lin1.weight",
            None,
        ),
        (
            DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]),
            "encoder.rel_embeddings.weight",
            "encoder.layer.{}.attention.self.query_proj.weight",
            None,
        ),
        (
            ModernBertConfig(**SMALL, pad_token_id=0),
            "embeddings.tok_embeddings.weight",
            "layers.{}.mlp.Wo.weight",
            "final_norm.weight",
        ),
        (GPT2Config(vocab_size=100, n_embd=16, n_layer=3, n_head=2), "wpe.weight", "h.{}.attn.c_attn.weight", "ln_f.bias"),
        (LlamaConfig(**SMALL), "embed_tokens.weight", "layers.{}.mlp.up_proj.weight", "norm.weight"),
        (
            T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2),
            "shared.weight",
            "encoder.block.{}.layer.0.SelfAttention.q.weight",
            "encoder.final_layer_norm.weight",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_layers_are_found_in_every_naming(config, embeddings, layer, last):
    model = T5EncoderModel(config) if config.model_type == "t5" else AutoModel.from_config(config)
    below = layers_below_top([f"transformer.{name}" for name, _ in model.named_parameters()])
    assert below[f"transformer.{embeddings}"] == 3
    assert [below["transformer." + layer.format(i)] for i in range(3)] == [2, 1, 0]
    assert last is None or below[f"transformer.{last}"] == 0
    assert set(below.values()) == {0, 1, 2, 3}


def test_a_layer_that_repeats_is_one_layer():
    config = AlbertConfig(**SMALL, embedding_size=8)
    below = layers_below_top([name for name, _ in AutoModel.from_config(config).named_parameters()])
    assert set(below.values()) == {0, 1}
    assert below["embeddings.word_embeddings.weight"] == 1


def test_layer_decay_needs_numbered_layers():
    with pytest.raises(SettingsError, match="--layer-decay: this encoder's parameters have no numbered layers"):
        layers_below_top(["transformer.embeddings.weight", "transformer.dense.weight"])


def test_learning_rates_fall_from_layer_to_layer():
    encoder = small_encoder(layers=3)
    made = optimizers(encoder, Settings(encoder_lr=1e-3, intermediate_lr=5e-3, layer_decay=0.5))
    peaks = peak_lrs(made)
    named = {name: peaks[id(parameter)] for name, parameter in encoder.named_parameters()}
    layers = [f"transformer.encoder.layer.{i}.output.dense.weight" for i in range(3)]
    assert [named[name] for name in layers] == pytest.approx([2.5e-4, 5e-4, 1e-3])
    assert named["transformer.embeddings.word_embeddings.weight"] == pytest.approx(1.25e-4)
    assert named["intermediate.weight"] == 5e-3
    assert set(peak_lrs(optimizers(encoder, Settings(encoder_lr=1e-3, intermediate_lr=1e-3))).values()) == {1e-3}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_new_optimizer_has_changed_nothing(dtype):
    encoder = small_encoder()
    encoder.set_dtype(dtype)
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    made = optimizers(encoder, Settings(encoder_dtype=dtype, weight_decay=0.1))
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    tensors = state_tensors(made, encoder)
    assert all(not tensor.any() for tensor in tensors.values())
    assert {f"{name}.exp_avg_sq" for name in before} < tensors.keys()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_clipped_and_what_is_not_finite_shows(dtype):
    encoder = small_encoder()
    encoder.set_dtype(dtype)
    made = optimizers(encoder, Settings(encoder_dtype=dtype))
    parameters = list(encoder.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 100.0)
    parameters[3].grad.view(-1)[0] = math.nan
    before = [parameter.clone() for parameter in parameters]
    assert not clip(made, 1.0).isfinite(), "what tells the trainer to stop"

    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 100.0)
    grads = [parameter.grad for parameter in parameters]
    assert clip(made, 1.0).isfinite()
    step(made, 0.5)
    assert all(parameter.grad is None for parameter in parameters)
    assert {group["lr"] for group in groups(made)} == {0.5 * Settings.encoder_lr, 0.5 * Settings.intermediate_lr}
    moved = [
        name for (name, parameter), old in zip(encoder.named_parameters(), before, strict=True) if (parameter != old).any()
    ]
    assert len(moved) > 0.8 * len(parameters)  # weights of 1 need more than one step to move in bf16
    if dtype == "fp32":  # the other one uses the gradients' memory
        assert math.sqrt(sum(grad.square().sum().item() for grad in grads)) == pytest.approx(1, rel=1e-3)


class Ones(nn.Module):
    """Stands in for an encoder: weights of 1, beside which a step of 1e-4 is lost in bf16 (its steps are 0.0039 wide there)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Linear(4, 4)
        nn.init.ones_(self.transformer.weight)


def descend(dtype: torch.dtype, steps: int) -> nn.Parameter:
    model = Ones().to(dtype)
    settings = Settings(encoder_dtype="bf16" if dtype is torch.bfloat16 else "fp32", encoder_lr=1e-4, weight_decay=0.0)
    made = optimizers(model, settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = (1 + 0.1 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        assert clip(made, 0.0).isfinite()
        step(made, 1.0)
    return model.transformer.weight


def test_small_steps_of_bf16_weights_add_up():
    exact, rounded = descend(torch.float32, 300), descend(torch.bfloat16, 300)
    assert rounded.dtype == torch.bfloat16
    assert (exact < 0.98).all()
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.004)
    plain = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(300):
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    assert (plain == 1).all(), "without compensation nothing moves, so the test says something"


def test_frozen_encoder_without_intermediate_layer_has_no_optimizer():
    encoder = small_encoder(intermediate=0)
    assert optimizers(encoder, Settings(freeze_encoder=True)) == []
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_only_matrices_decay():
    encoder = small_encoder()
    made = optimizers(encoder, Settings(weight_decay=0.1))
    for group in groups(made):
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def bag_of_words() -> Encoder:
    return small_encoder(layers=0)


def test_word_vectors_of_a_bag_have_an_optimizer_whose_steps_touch_the_words_of_the_batch_alone():
    """The intermediate layer behind them keeps AdamW; all gradients are clipped as one."""
    encoder = bag_of_words()
    made = optimizers(encoder, Settings(encoder_lr=1e-2, intermediate_lr=1e-3))
    words = encoder.transformer.words.weight
    before, peaks = words.detach().clone(), peak_lrs(made)
    assert peaks[id(words)] == 1e-2
    assert peaks[id(encoder.intermediate.weight)] == 1e-3
    for scale in (1.0, 0.5):  # words of the first step do not move in the second
        ids = torch.tensor(encoder.tokenize(TEXTS[:1] if scale == 1 else TEXTS[1:2]))
        encoder(ids, torch.ones_like(ids)).square().sum().mul(1e3).backward()
        whole = torch.cat(
            [words.grad.to_dense().flatten(), *(each.grad.flatten() for each in encoder.intermediate.parameters())]
        )
        torch.testing.assert_close(clip(made, 1.0), whole.norm())
        clipped = [words.grad.to_dense(), *(each.grad for each in encoder.intermediate.parameters())]
        assert math.sqrt(sum(each.square().sum().item() for each in clipped)) == pytest.approx(1, rel=1e-3)
        step(made, scale)
        moved = (words != before).any(dim=1).nonzero().flatten()
        assert set(moved.tolist()) == set(ids.flatten().tolist())
        before = words.detach().clone()


def test_word_vectors_that_are_not_finite_show():
    encoder = bag_of_words()
    made = optimizers(encoder, Settings())
    encoder.transformer.words(torch.tensor([5])).sum().mul(math.nan).backward()
    assert not clip(made, 1.0).isfinite()


def test_the_state_of_both_optimizers_is_in_the_checkpoint():
    encoder = bag_of_words()
    names = state_tensors(optimizers(encoder, Settings()), encoder).keys()
    assert {
        "transformer.words.weight.exp_avg_sq",
        "transformer.words.weight.seen",
        "intermediate.weight.exp_avg",
        "intermediate.bias.exp_avg_sq",
    } < names


def test_word_vectors_in_bf16_keep_the_optimizer_that_knows_it():
    encoder = bag_of_words()
    encoder.set_dtype("bf16")
    (only,) = optimizers(encoder, Settings(encoder_dtype="bf16"))
    ids = torch.tensor(encoder.tokenize(TEXTS[:1]))
    encoder(ids, torch.ones_like(ids)).sum().backward()
    before = encoder.transformer.words.weight.detach().clone()
    clip([only], 0.0)
    step([only], 1.0)
    assert (encoder.transformer.words.weight != before).any()


def test_layer_decay_and_a_bag_of_words_is_refused():
    with pytest.raises(SettingsError, match="--layer-decay"):
        optimizers(bag_of_words(), Settings(layer_decay=0.9))
