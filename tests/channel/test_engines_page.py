"""docs/engines.md: its Python runs, with programs that are not installed replaced by what records their calls."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from channel.engines import FusedModel
from channel.weights import save

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.channel.receivers import sglang
from sparsedelta.channel.receivers.trl import ChannelTransfer

PAGE = (Path(__file__).parents[2] / "docs" / "engines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# The routes of vLLM 0.33.0 (entrypoints/rl/online/api_router.py).
ROUTES = {
    "init_weight_transfer_engine",
    "pause",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "resume",
}


class SGLang:
    """The methods of SGLang's ``Engine`` that the page calls, on one model."""

    def __init__(self, model: Any) -> None:
        self.model, self.is_open = model, False

    def begin_weight_update(self) -> None:
        self.is_open = True

    def update_weights_from_tensor(self, named_tensors: Any, *, load_format: str) -> None:
        assert (self.is_open, load_format) == (True, sglang.LOADER)
        sglang.load(self.model, named_tensors)

    def end_weight_update(self) -> None:
        self.is_open = False


class Loader(FusedModel):
    """A model that keeps what it is given."""

    def load_weights(self, weights: Any) -> set[str]:
        self.given = {name: tensor.clone() for name, tensor in weights}
        return {*self.given}


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = sparsedelta.Channel(tmp_path / "channel")
    entry = publish_checkpoint(channel, save(tmp_path / "model", 1))
    posted: list[tuple[str, Any]] = []

    def post(url: str, **options: Any) -> Any:
        posted.append((url.rpartition("/")[2], options["json"]))
        return SimpleNamespace(raise_for_status=lambda: None)

    stub = ModuleType("requests")
    stub.__dict__["post"] = post
    monkeypatch.setitem(sys.modules, "requests", stub)
    names: dict[str, Any] = {"AsyncGRPOTrainer": SimpleNamespace}
    places = {
        "s3://bucket/run": str(tmp_path / "channel"),
        "/shared/versions": str(tmp_path / "versions"),
        '"model/"': repr(str(tmp_path / "model")),
        "AsyncGRPOTrainer(..., ": "AsyncGRPOTrainer(",
    }
    assert len(BLOCKS) == 4
    for number, block in enumerate(BLOCKS):
        for old, new in places.items():
            block = block.replace(old, new)
        exec(block, names)
        if number == 0:
            names["load"](entry)
            assert {name for name, _ in posted} == ROUTES
            assert ("update_weights", {"update_info": {"version": 1}}) in posted
        if number == 1:
            model = Loader()
            names["load"](SGLang(model), entry)
            assert model.given.keys() == {"a", "b"}
    assert names["version"] == 1
    assert (tmp_path / "versions" / "weight_v000001" / "config.json").exists()
    assert isinstance(names["trainer"].weight_transfer, ChannelTransfer)
