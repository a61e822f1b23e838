"""A tiny causal language model with its tokenizer, and a function that runs an example script."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(texts: Sequence[str], n_tokens: int = 300) -> Any:
    """Return a byte-level BPE tokenizer trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_causal(
    folder: Path, tokenizer: Any, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny random Llama with its tokenizer."""
    import transformers

    given = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    make_config: Any = transformers.LlamaConfig
    make_model: Any = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    make_model(make_config(**{**given, **changes})).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_script(
    name: str, words: Sequence[object], monkeypatch: pytest.MonkeyPatch
) -> int | str | None:
    """Run a script of ``examples/`` with these arguments; return its exit code or message."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.syspath_prepend(str(RECIPES))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return ended.value.code
