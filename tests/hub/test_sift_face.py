"""``get_sift_model``, ``push_to_hub`` and ``from_pretrained`` with a base on the Hub."""

from __future__ import annotations

import shutil

import pytest
from hub.hub_helpers import Person, publish, save_delta
from hub.hub_server import LoopbackHub

torch = pytest.importorskip("torch")  # the other tests of the Hub run without torch
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from train_helpers import make_bert  # noqa: E402

SCRIPT = """
import torch, transformers, sift_train
from sift_train import SiftConfig, from_pretrained, get_sift_model
model = transformers.AutoModelForSequenceClassification.from_pretrained("org/bert", dtype=torch.float32)
config = SiftConfig(sparse_rate=0.1, sparse_module=["query"], selection="random")
assert get_sift_model(model, config) is model
optimizer = torch.optim.AdamW(model.sift.parameters_in_optimizer(), lr=1e-2)
ids = torch.arange(10)[None]
model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
optimizer.step()
report = model.sift.push_to_hub("me/tuned")
print(report.base)
again = model.sift.push_to_hub("me/tuned", dry_run=True)
assert not any(file.changed for file in again.files)
loaded = from_pretrained("me/tuned", dtype=torch.float32)
pairs = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
assert all(a == b and torch.equal(x.view(torch.int32), y.view(torch.int32)) for (a, x), (b, y) in pairs)
plain = torch.nn.Linear(2, 2)
plain.config = type("Config", (), {"_name_or_path": "/tmp/of/a/pipeline/unet"})()
try:
    sift_train.SIFT(plain, sparse_module="weight").push_to_hub("me/other")
except ValueError as error:
    print(error)
more = get_sift_model(loaded, config)  # trained on: the base is what the delta made
optimizer = torch.optim.AdamW(more.sift.parameters_in_optimizer(), lr=1e-2)
more(input_ids=ids, labels=torch.tensor([1])).loss.backward()
optimizer.step()
import huggingface_hub
state = "sift.safetensors"  # as trainer.push_to_hub leaves it beside the delta
huggingface_hub.HfApi().upload_file(path_or_fileobj=b"1", path_in_repo=state, repo_id="me/tuned")
print(more.name_or_path, more.sift.push_to_hub("me/tuned").base)
last = from_pretrained("me/tuned", dtype=torch.float32)
pairs = zip(more.state_dict().values(), last.state_dict().values(), strict=True)
assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in pairs)
"""


def test_a_model_of_the_hub_is_trained_pushed_and_loaded(me: Person, hub: LoopbackHub) -> None:
    folder = make_bert(me.folder / "bert", torch.float32)
    commit = publish(hub, "org/bert", folder)
    done = me.python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    base, refusal, named = done.stdout.splitlines()
    oids = [
        oid
        for oid, commit in hub.state.repos["me/tuned"].commits.items()
        if "delta.sd" in commit.files
    ]
    assert named == f"me/tuned hf://me/tuned/delta.sd@{oids[0]}"
    assert base == f"org/bert@{commit}"
    assert refusal.startswith("it is not known from where SparseLinear was loaded; give base")


REVISION = """
import sys, torch, transformers
from sift_train import SiftConfig, get_sift_model
cls = transformers.AutoModelForSequenceClassification
for revision in sys.argv[2:]:
    cls.from_pretrained("org/bert", dtype=torch.float32, revision=revision)
model = cls.from_pretrained("org/bert", dtype=torch.float32, revision=sys.argv[1])
model = get_sift_model(model, SiftConfig(sparse_rate=0.1, selection="random"))
model.sift.parameters_in_optimizer()
try:
    print(model.sift.push_to_hub("me/tuned").base)
except ValueError as error:
    print(error)
print(model.sift.push_to_hub("me/named", base_id=f"org/bert@{sys.argv[1]}").base)
"""


def test_the_base_is_the_commit_that_was_loaded(me: Person, hub: LoopbackHub) -> None:
    """The default branch has the same weights, and another tokenizer by now."""
    loaded = publish(hub, "org/bert", make_bert(me.folder / "bert", torch.float32))
    hub.state.add_commit("org/bert", {"tokenizer.json": b"moved"})
    main = hub.state.head("org/bert").oid
    done = me.python("-c", REVISION, loaded)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"org/bert@{loaded}"] * 2
    done = me.python("-c", REVISION, loaded, main)
    said, named = done.stdout.splitlines()
    assert said.startswith("the cache has several commits of 'org/bert' that differ (")
    assert "base_id='org/bert@<commit>'" in said
    assert named == f"org/bert@{loaded}"


FOLDER = """
import sys, torch
from sift_train import SiftConfig, from_pretrained, get_sift_model
model = from_pretrained("hf://me/many/v2", dtype=torch.float32)
model = get_sift_model(model, SiftConfig(sparse_rate=0.1, selection="random"))
optimizer = torch.optim.AdamW(model.sift.parameters_in_optimizer(), lr=1e-2)
model(input_ids=torch.arange(10)[None], labels=torch.tensor([1])).loss.backward()
optimizer.step()
try:
    model.sift.push_to_hub("me/more")
except ValueError as error:
    print(error)
print(model.sift.push_to_hub("me/more", base_id="hf://me/many/v2").base)
"""


def test_a_model_of_a_folder_of_a_repository(me: Person, hub: LoopbackHub) -> None:
    folder = make_bert(me.folder / "bert", torch.float32)
    publish(hub, "org/bert", folder)
    weights = load_file(folder / "model.safetensors")
    for number in (1, 2):
        target = me.folder / f"v{number}"
        shutil.copytree(folder, target)
        weights["bert.pooler.dense.weight"][number] += 1
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        delta = save_delta(folder, target, me.folder / f"v{number}.sd")
        where = ("--subfolder", "v2") if number == 2 else ()
        me.good("push", delta, "me/many", "--base-id", "org/bert", *where)
    done = me.python("-c", FOLDER)
    assert done.returncode == 0, done.stderr
    said, base = done.stdout.splitlines()
    assert said.startswith("it is not known from where")
    assert base == f"hf://me/many/v2/delta.sd@{hub.state.head('me/many').oid}"


GONE = """
import torch, transformers
from sift_train import SiftConfig, get_sift_model
model = transformers.AutoModelForSequenceClassification.from_pretrained("org/bert", dtype=torch.float32)
model = get_sift_model(model, SiftConfig(sparse_rate=0.1, selection="random"))
model.sift.parameters_in_optimizer()
print(model.sift.push_to_hub("me/tuned").base)
"""


def test_a_commit_in_the_cache_that_the_repository_no_longer_has(
    me: Person, hub: LoopbackHub
) -> None:
    folder = make_bert(me.folder / "bert", torch.float32)
    publish(hub, "org/bert", folder)
    assert me.python("-c", GONE).returncode == 0
    hub.state.repos.pop("org/bert")
    (folder / "README.md").write_text("made anew")
    commit = publish(hub, "org/bert", folder)
    done = me.python("-c", GONE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"org/bert@{commit}"
