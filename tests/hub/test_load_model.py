"""``load_model`` on a repository: the base is downloaded, and the target is not written to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.hub_helpers import Person, publish, save_delta
from hub.hub_server import LoopbackHub

torch = pytest.importorskip("torch")  # the other tests of the Hub run without torch
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from train_helpers import make_bert  # noqa: E402

SCRIPT = """
import sys
import sparsedelta
out, base = sys.argv[1:]
sparsedelta.load_model("me/bert", base=base).save_pretrained(out + "-local")
sparsedelta.load_model("me/bert").save_pretrained(out)
"""


def test_load_model_of_a_repository(me: Person, other: Person, hub: LoopbackHub) -> None:
    base, target = make_bert(me.folder / "bert", torch.bfloat16), me.folder / "tuned"
    make_bert(target, torch.bfloat16)
    weights = load_file(target / "model.safetensors")
    weights["bert.pooler.dense.weight"][0] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    publish(hub, "org/bert", base)
    delta = save_delta(base, target, me.folder / "bert.sd")
    me.good("push", delta, "me/bert", "--base-id", "org/bert")
    done = other.python("-c", SCRIPT, Path("out"), base)
    assert done.returncode == 0, done.stderr
    for out in ("out", "out-local"):
        found = load_file(other.folder / out / "model.safetensors")
        assert found.keys() == weights.keys()
        for name, wanted in weights.items():
            assert torch.equal(found[name].view(torch.int16), wanted.view(torch.int16)), name
