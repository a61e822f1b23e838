"""``load_model`` on a repository: the base is downloaded, and the target is not written to disk."""

from __future__ import annotations

import shutil
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


def test_load_model_with_a_base_further_down_the_chain(
    me: Person, other: Person, hub: LoopbackHub
) -> None:
    states = [make_bert(me.folder / f"s{n}", torch.bfloat16) for n in range(3)]
    weights = load_file(states[0] / "model.safetensors")
    for number, state in enumerate(states[1:], 1):
        weights["bert.pooler.dense.weight"][number] += 1
        save_file(weights, state / "model.safetensors", metadata={"format": "pt"})
    one = save_delta(states[0], states[1], me.folder / "one.sd", base_id="org/bert")
    two = save_delta(states[1], states[2], me.folder / "two.sd", base_id="me/one")
    publish(hub, "org/bert", states[0])
    hub.state.add_repo("me/one", {"delta.sd": one.read_bytes()})
    hub.state.add_repo("me/bert", {"delta.sd": two.read_bytes()})
    done = other.python("-c", SCRIPT, Path("out"), states[0])
    assert done.returncode == 0, done.stderr
    for out in ("out", "out-local"):
        found = load_file(other.folder / out / "model.safetensors")
        assert torch.equal(found["bert.pooler.dense.weight"], weights["bert.pooler.dense.weight"])


PIPELINE = """
import sparsedelta
absent = {name: None for name in ("tokenizer", "feature_extractor", "safety_checker")}
pipeline = sparsedelta.load_model("me/pipe", options=absent)
pipeline.save_pretrained("out")
"""


def test_load_model_of_a_pipeline_on_the_hub(me: Person, hub: LoopbackHub) -> None:
    pytest.importorskip("diffusers")
    from live import pipelines

    base, target = me.folder / "pipe", me.folder / "tuned"
    pipelines.KINDS["sd"]().save_pretrained(base)
    shutil.copytree(base, target)
    name = "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(target / name)
    weights["conv_in.weight"][0] += 1
    save_file(weights, target / name, metadata={"format": "pt"})
    publish(hub, "org/pipe", base)
    me.good(
        "push", save_delta(base, target, me.folder / "p.sd"), "me/pipe", "--base-id", "org/pipe"
    )
    done = me.python("-W", "ignore", "-c", PIPELINE)
    assert done.returncode == 0, done.stderr
    assert torch.equal(
        load_file(me.folder / "out" / name)["conv_in.weight"], weights["conv_in.weight"]
    )
