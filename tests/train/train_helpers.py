"""Small models and data, and a comparison of bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether dtype, shape and all bits are equal, including NaNs and signed zeros."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    view = _INTEGERS[left.element_size()]
    return torch.equal(left.detach().view(view), right.detach().view(view))


class Net(nn.Module):
    """Two linear layers with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.norm(self.first(x))))
        return out


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_inputs(n: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 12, generator=generator) for _ in range(n)]


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def make_bert(folder: Path, dtype: torch.dtype) -> Path:
    """Save a tiny random classifier, and files that transformers does not write."""
    import transformers

    make_config: Any = transformers.BertConfig  # accepts more arguments than its signature shows
    config = make_config(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    make_model: Any = transformers.BertForSequenceClassification
    model = make_model(config).to(dtype)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def bert_batches(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, 60, (4, 10), generator=generator),
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }
        for _ in range(n)
    ]
