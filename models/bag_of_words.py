"""A bag of words in the form of a Hugging Face model: an encoder that a CPU trains from scratch within minutes.

Dimensions: B batch, S sequence length, H width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
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


AutoConfig.register(BagOfWordsConfig.model_type, BagOfWordsConfig, exist_ok=True)
AutoModel.register(BagOfWordsConfig, BagOfWords, exist_ok=True)
