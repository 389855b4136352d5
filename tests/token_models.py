"""Small models of tokens, called as the transformers library calls its own."""

from collections import UserDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class Encoding(UserDict):
    """A batch whose items are attributes, too, as tokenizers return them."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Encoder(nn.Module):
    """One layer of attention; with `answer` it returns what that makes of logits and hidden."""

    def __init__(self, answer=Output, width=8, words=20):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.kinds = nn.Embedding(2, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.mixed = nn.Conv1d(width, width, 1)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)
        self.answer = answer

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embedding(input_ids) + self.kinds(token_type_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        x = self.norm(x + scores.softmax(2) @ self.value(x))
        x = x + self.mixed(x.transpose(1, 2)).transpose(1, 2)
        flat = self.up(x.flatten(0, 1)).relu()  # samples and positions in one axis
        x = x + self.down(flat).view_as(x)
        weights = attention_mask[..., None].to(x.dtype)
        pooled = (x * weights).sum(1) / weights.sum(1)
        return self.answer(self.head(pooled), x)


def dictionary(logits, hidden):
    return {"logits": logits, "hidden": hidden}


class Heads(nn.Module):
    """Several inputs by their places: an image and a vector."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, image, vector):
        return self.head(self.conv(image).mean((2, 3)) + self.linear(vector))


class Padded(nn.TransformerEncoder):
    """torch's own encoder with two layers, which is told of padding by a mask of its own name."""

    def __init__(self, batch_first=True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first)
        super().__init__(layer, 2, enable_nested_tensor=batch_first)
