"""The reported memory equals that of the tensors, and a plan equals the report of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from train_helpers import make_bert, make_inputs, make_net, square_loss

import sparsedelta
from sift_train import SIFT, plan, selection


def n_bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_counts_every_tensor(dtype: torch.dtype) -> None:
    model = make_net().to(dtype)
    with SIFT(model, 0.1, ["first.weight", "last"], "last.bias") as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer())
        square_loss(model, make_inputs(1)[0].to(dtype)).backward()
        masters = sift.parameters_in_optimizer()
        report = sift.memory_report()
        assert report.gradient_bytes == n_bytes(master.grad for master in masters)
        optimizer.step()
        states = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert report.optimizer_bytes == n_bytes(states)
        assert report.master_bytes == n_bytes(masters)
        parts = list(sift.sparse_mapping.values())
        assert report.index_bytes == n_bytes(p.flat_index for p in parts if not p.trains_all)
        assert report.host_bytes == n_bytes(p.original for p in parts)
        assert report.weight_bytes == n_bytes(model.parameters())
        assert report.largest_gradient_bytes == n_bytes([model.first.weight])
        assert report.n_trained == sift.n_trained
        assert report.trained_bytes == 20 * (sift.n_trained - 4) + 16 * 4
        moments = (
            report.largest_gradient_bytes + report.selection_bytes,
            report.largest_gradient_bytes + report.optimizer_bytes,
            report.write_bytes + report.optimizer_bytes,
        )
        assert report.peak_bytes == report.weight_bytes + 12 * (sift.n_trained - 4) + 8 * 4 + max(
            moments
        )
        assert "trained: 31 of 308 components, 10.06 %" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_counts_what_publishing_keeps(dtype: torch.dtype, tmp_path: Path) -> None:
    """All trained components change between two versions: the most that is ever kept."""
    model = make_net().to(dtype)
    model.register_buffer("seen", torch.zeros(7))
    model.register_buffer("passing", torch.zeros(1000), persistent=False)
    with SIFT(model, 0.1, ["first.weight", "last"], "last.bias", lr_transfer=False) as sift:
        trained = {
            name: None if part.trains_all else part.flat_index
            for name, part in sift.sparse_mapping.items()
        }
        with sparsedelta.Publisher(tmp_path / "channel", model, trained=trained) as publisher:
            with torch.no_grad():
                for master in sift.parameters_in_optimizer():
                    master.add_(1)
            source: Any = publisher._run._source
            kept = source._snapshot.n_bytes
            changed = source._snapshot.capture().n_bytes
        index = sum(
            part.flat_index.nbytes for part in sift.sparse_mapping.values() if not part.trains_all
        )
        assert sift.memory_report().publish_bytes == kept + index + changed


def test_a_plan_is_the_report_of_the_live_run(tmp_path: Path) -> None:
    import transformers

    folder = make_bert(tmp_path / "base", torch.bfloat16)
    load: Any = transformers.AutoModelForSequenceClassification
    model = load.from_pretrained(folder, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"sparse_module": ["query", "dense"], "exception": "classifier"}
    planned = plan(folder, 0.05, **arguments)
    by_config = plan(transformers.AutoConfig.from_pretrained(folder), 0.05, **arguments)
    live = SIFT(model, 0.05, **arguments).memory_report()
    for field in type(live).__dataclass_fields__:
        assert getattr(planned, field) == getattr(live, field), field
    assert by_config == planned


def seven_b() -> Any:
    import transformers

    return transformers.LlamaConfig(architectures=["LlamaForCausalLM"])  # LLaMA-7B's shape


def test_a_plan_of_7b_needs_no_weights() -> None:
    planned = plan(seven_b(), 0.05)
    n_targets = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert planned.n_total == n_targets + 2 * 32000 * 4096 + 65 * 4096
    assert planned.n_trained == sum(
        32 * n * (int(0.05 * size) + 1) for n, size in ((4, 4096**2), (3, 4096 * 11008))
    )
    assert planned.trained_bytes == 20 * planned.n_trained
    assert round(planned.trained_bytes / 2**30, 1) == 6.0
    assert planned.largest_gradient_bytes == 2 * 4096 * 11008
    # The peak is a backward pass: there is more optimizer state than choosing or writing takes.
    assert planned.peak_bytes == (
        planned.weight_bytes + planned.largest_gradient_bytes + planned.trained_bytes
    )
    assert planned.selection_bytes < 0.4 * 2**30
    assert planned.write_bytes == 10 * (int(0.05 * 4096 * 11008) + 1)
    assert "fits in 24 GiB, with 5." in str(planned)
    assert planned.fits(16).startswith("lacks")
    assert (
        planned.fits(8) == "does not fit in 8 GiB at any rate: weights and one gradient need more"
    )
    highest = planned.highest_rate(24)
    assert highest is not None
    at_limit = plan(seven_b(), highest)
    assert abs(at_limit.room_in(24)) < 2**20
    assert planned.highest_rate(24, activations_gb=planned.room_in(24) / 2**30) == pytest.approx(
        0.05, rel=1e-4
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("rate", [0.0001, 0.05, 0.5])
def test_at_its_highest_rate_a_plan_just_fits(rate: float, optimizer: str) -> None:
    """For each of the three times at which the peak can occur."""
    planned = plan(seven_b(), rate, optimizer=optimizer)
    highest = planned.highest_rate(24)
    assert highest is not None
    assert abs(plan(seven_b(), highest, optimizer=optimizer).room_in(24)) < 2**26
    at_least = (planned.weight_bytes + planned.largest_gradient_bytes) / 2**30
    # Enough for the permanent parts, then less than choosing needs.
    assert plan(seven_b(), rate, optimizer="sgd").highest_rate(at_least + 0.01) is None


@pytest.mark.parametrize("k", [1, 5, 20_000, 99_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radix", [(), ("cpu",)])
def test_choosing_needs_at_most_the_planned_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, k: int, radix: tuple[str, ...]
) -> None:
    """Counted by torch's allocator, with as many ties as possible."""
    monkeypatch.setattr(selection, "CPU_SLICE", 1 << 14)
    monkeypatch.setattr(selection, "DEVICE_SLICE", 1 << 14)
    monkeypatch.setattr(selection, "RADIX_SELECT", radix)
    scores = torch.zeros(100_000, dtype=dtype)
    scores[::7] = 1.0
    generator = selection.seeded_generator(0, "")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        selection.top_k(scores, k, generator)
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    histograms = 4 * 8 * (1 << 16)
    draws = 8 * 2 * len(scores)  # on the host for every device
    assert most <= selection.search_bytes(len(scores), k) + histograms + draws


def test_a_plan_of_a_module_keeps_its_dtype() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 10))
    planned = plan(model, 0.1, optimizer="sgd")
    assert planned.weight_bytes == 4 * (5050 + 510)
    assert planned.optimizer_bytes == 0
    with pytest.raises(ValueError, match="optimizer is 'lion'"):
        plan(model, 0.1, optimizer="lion")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_reads_the_dtype_that_the_folder_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_bert(tmp_path / "base", dtype)
    name = str(dtype).removeprefix("torch.")
    planned = plan(folder, 0.1)
    assert planned.dtype == name
    assert planned.weight_bytes == pytest.approx(planned.n_total * dtype.itemsize, rel=0.05)
    assert f"weights in {name}" in str(planned)
    assert plan(folder, 0.1, dtype="fp16").dtype == "float16"  # the argument has priority
    assert plan(folder, 0.1, dtype=torch.float64).dtype == "float64"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == name
    (folder / "model.safetensors").unlink()  # the config has it too
    assert plan(folder, 0.1).dtype == name
    (folder / "config.json").write_text(json.dumps(config | {"dtype": None}))
    assert plan(folder, 0.1).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int8, "bf17", "nn"])
def test_a_dtype_that_cannot_be_trained_is_refused(dtype: Any) -> None:
    with pytest.raises(
        ValueError, match=r"dtype is '.*', but weights cannot be trained in it; choose one of"
    ):
        plan(seven_b(), 0.05, dtype=dtype)


@pytest.mark.parametrize("place", ["./nowhere", "a/b/c", "/nowhere", "org/", Path("org/name")])
def test_a_missing_folder_raises_without_asking_the_hub(
    monkeypatch: pytest.MonkeyPatch, place: str | Path
) -> None:
    asked = no_hub(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"no folder '.*' exists"):
        plan(place, 0.1)
    assert asked == []


def test_a_folder_without_a_config_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json, so it is not a model folder"):
        plan(tmp_path, 0.1)


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked = no_hub(monkeypatch)
    auto: Any = transformers.AutoConfig
    look = auto.from_pretrained
    looked: list[bool] = []

    def from_pretrained(source: Any, *, local_files_only: bool = False) -> Any:
        looked.append(local_files_only)
        return look(source, local_files_only=local_files_only)

    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    with pytest.raises(FileNotFoundError) as told:
        plan("org/no-such-name", 0.1)
    assert str(told.value) == (
        "no folder 'org/no-such-name' exists, the local cache has no config for that id, and the Hub was not reached "
        "(no route); try again with a connection, or give a folder"
    )
    assert looked == [True]  # the client itself would retry many times
    assert [url.endswith("org/no-such-name/resolve/main/config.json") for url in asked] == [True]


def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the Hub unreachable; return a list to which requested addresses are added."""
    import huggingface_hub

    asked: list[str] = []

    def metadata(url: str, **_: Any) -> None:
        asked.append(url)
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return asked


PEAK = """
import torch
from torch import nn
from sift_train import SIFT

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
layers = [nn.Linear(1024, 1024, bias=False) for _ in range(24)]  # 96 MiB
model = nn.Sequential(*layers)
x = torch.randn(2, 1024)
sift = SIFT(model, {rate}, "weight", selection="random")
optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), foreach=False)
def step():
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
step()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step()
report = sift.memory_report()
print(status("VmHWM") - before, report.gradient_bytes + report.largest_gradient_bytes)
print(report.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_step_needs_at_most_the_reported_memory(rate: float) -> None:
    """Resident memory over a step: the masters' gradients and one dense gradient, not all."""
    code = PEAK.format(rate=rate)
    done = subprocess.run(
        [sys.executable, "-c", code],
        # So that freed memory returns to the system and is not counted.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    (rise, reported), (weights,) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert rise <= reported + 0.05 * weights
    assert rise > 3 << 20  # at least most of a dense gradient of 4 MiB: the measurement works


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


def test_a_plan_for_several_devices_counts_what_a_step_sends() -> None:
    model = Stack()
    alone, four = plan(model, 0.25), plan(model, 0.25, devices=4)
    assert alone.traffic is None
    assert four.weight_bytes == alone.weight_bytes
    assert four.write_bytes >= four.master_bytes > alone.write_bytes  # the gradients to send
    assert four.traffic is not None
    n = 4 * 17  # int(0.25 * 64) + 1 in each layer
    assert (four.traffic.sift_bytes, four.traffic.lora_bytes) == (4 * n, 4 * n)
    assert four.traffic.ddp_bytes == 4 * (80 + 4 * 72)
    assert "4 devices, data parallel" in str(four)


def test_a_plan_for_shards_divides_everything_but_one_unit() -> None:
    alone, four = plan(Stack(), 0.25), plan(Stack(), 0.25, devices=4, sharded=True)
    assert four.weight_bytes == alone.weight_bytes // 4
    assert four.trained_bytes == alone.trained_bytes // 4
    assert four.n_trained == alone.n_trained
    assert four.largest_gradient_bytes == 2 * 4 * 80  # the embedding is larger than a layer
    assert four.traffic is not None
    assert four.traffic.sift_bytes == 4 * 4 * 64
    assert four.traffic.gathered_bytes == 2 * alone.weight_bytes
    with pytest.raises(ValueError, match="devices is 0"):
        plan(Stack(), 0.25, devices=0)
