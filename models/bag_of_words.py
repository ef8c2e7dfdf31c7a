"""A bag of words in the form of a Hugging Face model: an encoder that a CPU trains from scratch within minutes.

Dimensions: B batch, S sequence length, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, layer_norm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

_EPSILON = 1e-6  # far below the variance of a mean of fresh vectors, 4e-4 / S


class BagOfWordsConfig(PreTrainedConfig):
    """vocab_size: tokens; hidden_size: H; initializer_range: standard deviation of fresh word vectors."""

    model_type = "bag_of_words"

    def __init__(self, vocab_size: int = 0, hidden_size: int = 0, initializer_range: float = 0.02, **facts: Any) -> None:
        super().__init__(**facts)
        self.vocab_size, self.hidden_size, self.initializer_range = vocab_size, hidden_size, initializer_range


class BagOfWords(PreTrainedModel):
    """A vector for each token, shifted and scaled so that the mean over a text has mean 0 and variance 1.

    Short and long texts then weigh the same, and training decides by a vector's length how much its word counts, as inverse
    document frequencies do: a word seen seldom starts short and adds little noise.
    """

    config_class = BagOfWordsConfig
    base_model_prefix = "bag"

    def __init__(self, config: BagOfWordsConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Hidden states fp32 [B, S, H] from token ids and mask (1 token, 0 padding), both int64 [B, S]."""
        vectors = self.words(input_ids)
        mask = attention_mask.unsqueeze(-1).to(vectors.dtype)
        mean = (vectors * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1, H]
        centre = mean.mean(dim=2, keepdim=True)
        scale = (mean.var(dim=2, keepdim=True, unbiased=False) + _EPSILON).rsqrt()
        return BaseModelOutput(last_hidden_state=(vectors - centre) * scale)

    def mean(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of each text's hidden states, fp32 [B, H], from what `forward` takes. No vector is made for each token."""
        weights = attention_mask / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean: Tensor = _WeightedSums.apply(self.words.weight, input_ids, weights, self.words.sparse)
        return layer_norm(mean.float(), mean.shape[1:], eps=_EPSILON)


class _WeightedSums(torch.autograd.Function):
    """words [V, H], ids int64 [B, S], weights fp32 [B, S] → Σₛ weights[b, s] · words[ids[b, s]], [B, H] in the type of words.

    The gradient is such a sum too: for each word of the batch, over the texts that have it. It is sparse if `sparse`.
    """

    @staticmethod
    def forward(ctx: Any, words: Tensor, ids: Tensor, weights: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(ids, weights)
        ctx.shape, ctx.sparse = words.shape, sparse
        return embedding_bag(ids, words, per_sample_weights=weights.to(words.dtype), mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ids, weights = ctx.saved_tensors
        tokens, order = ids.flatten().sort(stable=True)
        rows, counts = tokens.unique_consecutive(return_counts=True)
        values = embedding_bag(
            order // ids.shape[1],
            grad,
            counts.cumsum(0) - counts,
            per_sample_weights=weights.flatten()[order].to(grad.dtype),
            mode="sum",
        )
        if ctx.sparse:
            whole = torch.sparse_coo_tensor(rows[None], values, ctx.shape, is_coalesced=True, check_invariants=False)
        else:
            whole = values.new_zeros(ctx.shape).index_copy_(0, rows, values)
        return whole, None, None, None


AutoConfig.register(BagOfWordsConfig.model_type, BagOfWordsConfig, exist_ok=True)
AutoModel.register(BagOfWordsConfig, BagOfWords, exist_ok=True)
