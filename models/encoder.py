"""The text encoder in front of the head: a transformer, pooling over its tokens, an optional intermediate layer.

Dimensions: B batch, S sequence length, H pooled embedding width, D head input width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel

from models.bag_of_words import BagOfWords, BagOfWordsConfig
from models.checkpoint import saving
from models.wordpiece import PAD_ID, learn_wordpiece

Pooling = Literal["cls", "mean", "last"]
Dtype = Literal["fp32", "bf16-mixed", "bf16"]
MAX_WIDTH = 65_536  # the head addresses its inputs with 16 bits
_CONFIG, _WEIGHTS, _TOKENIZER, _SETTINGS = "config.json", "model.safetensors", "tokenizer.json", "encoder.json"


class EncoderError(ValueError):
    """An encoder cannot be made, loaded or configured; the message names the model or file and the fault."""


@dataclass(frozen=True)
class EncoderConfig:
    """What Fanin adds around a transformer.

    pooling       "cls" first token, "mean" of the tokens, "last" token (decoder-style embedders)
    max_length    tokens per text, special tokens included; longer texts are cut
    intermediate  width of the Linear + ReLU layer in front of the head, 0 for none
    dropout       on the pooled embedding, while training
    intermediate_dropout  on the intermediate layer's outputs, while training
    """

    pooling: Pooling
    max_length: int
    intermediate: int = 0
    dropout: float = 0.0
    intermediate_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise EncoderError(f"pooling is {self.pooling!r}, not one of {', '.join(get_args(Pooling))}")
        if self.max_length < 1:
            raise EncoderError(f"max_length is {self.max_length}, must be at least 1")
        if not 0 <= self.intermediate <= MAX_WIDTH:
            raise EncoderError(f"intermediate is {self.intermediate}, must be 0 (none) to {MAX_WIDTH}")
        for name, share in (("dropout", self.dropout), ("intermediate_dropout", self.intermediate_dropout)):
            if not 0 <= share < 1:
                raise EncoderError(f"{name} is {share}, must be at least 0 and below 1")


class Encoder(nn.Module):
    """Token ids int64 [B, S] → embeddings fp32 [B, D]. Made by `pretrained`, `small` or `load`, always in eval mode.

    config           EncoderConfig
    tokenizer        tokenizers.Tokenizer that neither pads nor truncates: callers decide
    pad_id           token id to pad with; padding goes to the right
    embedding_width  H
    width            D: the intermediate layer's width, or H
    """

    def __init__(self, transformer: PreTrainedModel, tokenizer: Tokenizer, pad_id: int, config: EncoderConfig) -> None:
        """Puts the parts together. The intermediate layer's weights come from torch's global generator."""
        super().__init__()
        positions = _positions(transformer)
        if positions is not None and config.max_length > positions:
            raise EncoderError(f"max_length is {config.max_length}, the model has {positions} positions")
        rows, tokens = getattr(transformer.config, "vocab_size", None), tokenizer.get_vocab_size()
        if rows is not None and tokens > rows:
            raise EncoderError(f"the tokenizer has {tokens} tokens, the model embeds {rows}")
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if config.max_length <= special:
            raise EncoderError(f"max_length is {config.max_length}, but {special} of them are special tokens")
        if getattr(transformer, "pooler", None) is not None:
            transformer.add_module("pooler", None)  # never used here: it would only be stored and exported
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.config = config
        self.tokenizer = tokenizer
        self.pad_id = pad_id
        self.embedding_width: int = transformer.config.hidden_size
        self.width = config.intermediate or self.embedding_width
        self.transformer = transformer
        self.dropout = nn.Dropout(config.dropout)
        self.intermediate_dropout = nn.Dropout(config.intermediate_dropout)
        self.intermediate = nn.Linear(self.embedding_width, config.intermediate) if config.intermediate else None
        if self.intermediate is not None:  # for a ReLU (He et al. 2015): outputs as large as inputs
            nn.init.kaiming_normal_(self.intermediate.weight, nonlinearity="relu")
            nn.init.zeros_(self.intermediate.bias)
        self._room = config.max_length - special
        self._autocast = False
        self.eval()

    @classmethod
    def pretrained(cls, name_or_path: str | Path, config: EncoderConfig) -> Encoder:
        """A Hugging Face encoder by hub name or local folder, in fp32. It must have a fast tokenizer (tokenizer.json)."""
        place = "this folder" if Path(name_or_path).is_dir() else "no such folder, and the Hugging Face hub"
        with _blaming(f"{name_or_path}: {place} gives no model"):
            transformer, report = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise EncoderError(f"{name_or_path}: {len(missing)} weights are missing, {missing[0]} first")
        if transformer.config.is_encoder_decoder:
            raise EncoderError(f"{name_or_path}: is an encoder-decoder; a plain encoder is needed")
        with _blaming(f"{name_or_path}: {place} gives no tokenizer"):
            fast = AutoTokenizer.from_pretrained(name_or_path)
        backend = getattr(fast, "backend_tokenizer", None)
        if backend is None:
            raise EncoderError(f"{name_or_path}: has no fast tokenizer, only {type(fast).__name__}")
        if not set(backend.get_vocab()).difference(fast.all_special_tokens):  # what transformers makes up when no file is there
            raise EncoderError(f"{name_or_path}: {place} gives no tokenizer: its vocabulary is empty")
        transformer.config.use_cache = False
        pad_id = next((i for i in (fast.pad_token_id, transformer.config.pad_token_id) if i is not None), 0)
        with _blaming(name_or_path):
            return cls(transformer, Tokenizer.from_str(backend.to_str()), pad_id, config)

    @classmethod
    def small(
        cls,
        texts: Sequence[str],
        config: EncoderConfig,
        *,
        vocabulary: int = 30_000,
        width: int = 256,
        layers: int = 3,
        heads: int = 4,
        seed: int,
    ) -> Encoder:
        """A BERT of `layers` layers with random weights, or a bag of words if there are none; its WordPiece vocabulary is
        learned from `texts`.

        It needs no model at hand and trains from scratch within minutes on two cores. The same texts and seed give the same
        encoder bit for bit.
        """
        if width < 1 or heads < 1 or width % heads:
            raise EncoderError(f"width is {width}, must be a multiple of the {heads} heads")
        if layers < 0:
            raise EncoderError(f"layers is {layers}, must be at least 0")
        if not layers and config.pooling != "mean":
            raise EncoderError(f"pooling is {config.pooling!r}: a bag of words has no order, only 'mean' makes sense")
        try:
            tokenizer = learn_wordpiece(texts, vocabulary)
        except ValueError as error:
            raise EncoderError(str(error)) from None
        facts: dict[str, Any] = {
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": width,
            "pad_token_id": PAD_ID,
            "dtype": "float32",
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not layers:
                return cls(BagOfWords(BagOfWordsConfig(**facts)), tokenizer, PAD_ID, config)
            shape = BertConfig(
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=config.max_length,
                type_vocab_size=1,
                **facts,
            )
            return cls(BertModel(shape, add_pooling_layer=False), tokenizer, PAD_ID, config)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the token ids must be."""
        return next(self.transformer.parameters()).device

    def set_dtype(self, dtype: Dtype) -> None:
        """What the transformer computes in; the embeddings, and the intermediate layer, are fp32 all the same.

        fp32        everything, as after `pretrained`, `small` and `load`
        bf16-mixed  weights fp32; while training, matrix products in bf16 (autocast)
        bf16        weights too; buffers stay fp32, as rotary frequencies must
        """
        self._autocast = dtype == "bf16-mixed"
        for parameter in self.transformer.parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if dtype == "bf16" else torch.float32)

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes each layer anew, dropout repeated, instead of reading what was kept of it.

        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". EncoderError when the transformer cannot do it.
        """
        transformer = self.transformer
        # Versions of transformers that have the first name warn of the second.
        enable = getattr(transformer, "activation_checkpointing_enable", None) or transformer.gradient_checkpointing_enable
        with _blaming("gradient checkpointing"):
            enable({"use_reentrant": False})

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its special tokens, at most `config.max_length`, without padding."""
        ids = []
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            encoding.truncate(self._room)
            ids.append(self.tokenizer.post_process(encoding).ids)
        return ids

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector per text, fp32 [B, H], from token ids and mask (1 token, 0 padding), both int64 [B, S]."""
        if isinstance(self.transformer, BagOfWords) and input_ids.device.type == "cpu" and not torch.compiler.is_exporting():
            return self.transformer.mean(input_ids, attention_mask)
        autocast = self._autocast and self.training  # what is evaluated is what is exported
        with torch.autocast(input_ids.device.type, torch.bfloat16) if autocast else nullcontext():
            output = self.transformer(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state.float()  # [B, S, H]
        if self.config.pooling == "cls":
            return hidden[:, 0]
        if self.config.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).float()
            return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * places).amax(dim=1)  # [B]
        return hidden.gather(1, last[:, None, None].expand(-1, -1, hidden.shape[2])).squeeze(1)

    def project(self, pooled: Tensor) -> Tensor:
        """The head's input fp32 [B, D]: the embedding, or the intermediate layer's outputs; with dropout while training."""
        embedding = self.dropout(pooled)
        return embedding if self.intermediate is None else self.intermediate_dropout(self.intermediate(embedding).relu())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Head inputs fp32 [B, D] from token ids and mask, both int64 [B, S]."""
        return self.project(self.pooled(input_ids, attention_mask))

    def save(self, folder: Path) -> None:
        """Writes config.json, model.safetensors, tokenizer.json and encoder.json into `folder`, which is made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.config.save_pretrained(folder)
        with saving():
            save_model(self, str(folder / _WEIGHTS))
        (folder / _TOKENIZER).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        widths = {"pad_id": self.pad_id, "embedding_width": self.embedding_width, "width": self.width}
        settings = asdict(self.config) | widths
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """The encoder that `save` wrote, bit for bit, in fp32; EncoderError names the file that is missing or damaged."""
        for name in (_SETTINGS, _CONFIG, _TOKENIZER, _WEIGHTS):
            if not (folder / name).is_file():
                raise EncoderError(f"{folder / name}: missing")
        with _blaming(folder / _SETTINGS):
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            config = EncoderConfig(**{field.name: settings[field.name] for field in fields(EncoderConfig)})
            pad_id = int(settings["pad_id"])
        with _blaming(folder / _TOKENIZER):
            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        with torch.random.fork_rng(devices=[]):  # weights drawn here are replaced at once
            with _blaming(folder / _CONFIG):
                transformer = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
            with _blaming(folder):
                encoder = cls(transformer, tokenizer, pad_id, config)
        with _blaming(folder / _WEIGHTS):
            load_model(encoder, folder / _WEIGHTS)
        return encoder


def _positions(transformer: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for; None if they are not counted."""
    positions = getattr(transformer.config, "max_position_embeddings", None)
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin count positions from the padding id + 1.
    offset = getattr(table, "padding_idx", None)
    return positions if positions is None or offset is None else positions - offset - 1


@contextmanager
def _blaming(source: object) -> Iterator[None]:
    """Turns any fault into an EncoderError that names `source`: files, network and model code each raise their own types."""
    try:
        yield
    except EncoderError as error:
        raise EncoderError(f"{source}: {error}") from None
    except Exception as error:
        message = " ".join(str(error).split())
        raise EncoderError(f"{source}: {type(error).__name__}: {message}") from error
