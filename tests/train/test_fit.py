"""``fit``: the loop is compared with plain torch, the delta with the trained files."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_counts import Counted
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_helpers import (
    bert_batches,
    make_bert,
    make_inputs,
    make_net,
    same_bits,
    snapshot,
    square_loss,
)

import sparsedelta
from sift_train import SIFT, FitConfig, StepReport, export_delta, fit, loop

LAYERS = ["query", "value", "intermediate"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "base", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_a_folder_the_delta_rebuilds_the_trained_folder(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = make_bert(tmp_path / "base", dtype)
    untouched = files_of(base)
    result = fit(
        base,
        bert_batches(3),
        output=tmp_path / "delta.sd",
        save_target=tmp_path / "trained",
        config=FitConfig(sparse_module=LAYERS, exception="classifier", lr=1e-2, epochs=2),
    )
    assert files_of(base) == untouched
    assert result.n_steps == 6
    sparsedelta.apply(base, result.delta, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "trained")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    changed = {name for name in before if not same_bits(before[name], weights[name])}
    assert changed == {
        name
        for name in before
        if "classifier" in name or any(fragment in name for fragment in LAYERS)
    }
    n_changed = sum(int((before[name] != weights[name]).sum()) for name in changed)
    assert result.nnz == n_changed <= result.n_trained < result.n_total
    assert {"vocab.txt", "1_Pooling/config.json", "config.json"} <= set(files_of(tmp_path / "out"))


@pytest.mark.parametrize("max_shard_size", ["50GB", "5KB"])
def test_a_new_head_on_a_base_without_the_prefix_leaves_the_names_of_the_base(
    tmp_path: Path, bert_folder: Path, max_shard_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    encoder: Any = transformers.AutoModel.from_pretrained(bert_folder)
    base = tmp_path / "encoder"
    encoder.save_pretrained(base, max_shard_size=max_shard_size)
    classifier: Any = transformers.BertForSequenceClassification
    model = classifier.from_pretrained(base, num_labels=3)
    save_whole = model.save_pretrained
    monkeypatch.setattr(
        model, "save_pretrained", lambda path: save_whole(path, max_shard_size=max_shard_size)
    )
    config = FitConfig(sparse_module=LAYERS, exception="classifier", lr=1e-2)
    result = fit(model, bert_batches(1), output=tmp_path / "delta.sd", base=base, config=config)
    head = {"classifier.weight", "classifier.bias"}
    with sparsedelta.load(result.delta) as delta:
        assert {row.name for row in delta.tensors if row.base is None} == head
    assert result.nnz <= result.n_trained
    sparsedelta.apply(base, result.delta, tmp_path / "out")
    loaded = classifier.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, loaded.state_dict()[name]), name


def test_only_delta_is_left_beside_the_base(tmp_path: Path, bert_folder: Path) -> None:
    fit(bert_folder, bert_batches(1), output=tmp_path / "delta.sd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta.sd"]


def test_the_settings_are_in_the_delta(tmp_path: Path, bert_folder: Path) -> None:
    config = FitConfig(lr=3e-3, sparse_module=("query",))
    result = fit(
        bert_folder, bert_batches(2), output=tmp_path / "d.sd", config=config, base_id="org/m@1"
    )
    with sparsedelta.load(result.delta) as delta:
        assert delta.base.id == "org/m@1"
        assert delta.info["settings"] == json.loads(json.dumps(config.as_json()))
        assert delta.info["steps"] == 2


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, bert_folder: Path) -> None:
    def run(name: str, seed: int) -> bytes:
        batches: Any = bert_batches(5)
        data: Any = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)
        config = FitConfig(lr=1e-2, seed=seed)
        return fit(bert_folder, data, output=tmp_path / name, config=config).delta.read_bytes()

    assert run("a.sd", 0) == run("b.sd", 0)
    assert run("c.sd", 1) != run("a2.sd", 0)


def test_selection_does_not_disturb_dropout(tmp_path: Path) -> None:
    """At rate 1 nothing is selected; both runs must still draw the same dropout masks."""

    def losses(rate: float) -> tuple[float, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        config = FitConfig(sparse_rate=rate, lr=1e-30)
        output = tmp_path / f"{rate}.sd"
        return fit(model, make_inputs(4), output=output, loss=square_loss, config=config).losses

    assert losses(1.0) == losses(0.1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_at_rate_one_the_loop_is_plain_torch(tmp_path: Path, name: str, accumulation: int) -> None:
    plain, ours = make_net(), make_net()
    inputs = make_inputs(5)
    config = FitConfig(
        sparse_rate=1.0,
        sparse_module=["weight", "bias"],
        optimizer=name,
        lr=1e-2,
        weight_decay=0.1,
        momentum=0.9,
        schedule="constant",
        warmup=0.0,
        accumulation=accumulation,
        max_grad_norm=0.1,
        epochs=2,
    )
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    vectors = [p for p in plain.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=1e-2)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    )
    losses = []
    for _ in range(2):
        for at in range(0, len(inputs), accumulation):
            window = inputs[at : at + accumulation]  # the last one is shorter
            optimizer.zero_grad()
            for batch in window:
                (square_loss(plain, batch) / len(window)).backward()
            with torch.no_grad():
                losses.append(sum(float(square_loss(plain, b)) for b in window) / len(window))
            nn.utils.clip_grad_norm_(list(plain.parameters()), 0.1)
            optimizer.step()
    result = fit(ours, inputs, output=tmp_path / "d.sd", loss=square_loss, config=config)
    for (key, left), right in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert same_bits(left, right), key
    assert result.losses == pytest.approx(losses, rel=1e-6)


def test_a_plain_module_without_a_base_file(tmp_path: Path) -> None:
    model, first = make_net(), make_net()
    target = tmp_path / "trained.safetensors"
    result = fit(
        model,
        make_inputs(4),
        output=tmp_path / "d.sd",
        save_target=target,
        loss=square_loss,
        config=FitConfig(sparse_rate=0.1, lr=1e-2),
    )
    save_file(first.state_dict(), tmp_path / "base.safetensors", metadata={"format": "pt"})
    sparsedelta.apply(tmp_path / "base.safetensors", result.delta, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == target.read_bytes()
    rebuilt = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(value, rebuilt[name]) for name, value in model.state_dict().items())
    assert not same_bits(first.first.weight, rebuilt["first.weight"])


def test_a_plain_module_with_its_base_file(tmp_path: Path) -> None:
    model = make_net()
    base = tmp_path / "base.safetensors"
    save_file({**model.state_dict(), "unused": torch.ones(3)}, base)
    result = fit(model, make_inputs(2), output=tmp_path / "d.sd", loss=square_loss, base=base)
    sparsedelta.apply(base, result.delta, tmp_path / "out.safetensors")
    rebuilt = load_file(tmp_path / "out.safetensors")
    assert all(same_bits(value, rebuilt[name]) for name, value in model.state_dict().items())
    assert "unused" not in rebuilt


def test_a_module_of_transformers_without_its_folder(tmp_path: Path, bert_folder: Path) -> None:
    import transformers

    load: Any = transformers.BertForSequenceClassification.from_pretrained
    model: nn.Module = load(bert_folder)
    load(bert_folder).save_pretrained(tmp_path / "resaved")
    result = fit(model, bert_batches(2), output=tmp_path / "d.sd", save_target=tmp_path / "trained")
    sparsedelta.apply(tmp_path / "resaved", result.delta, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "trained")


def test_fit_changes_only_the_weights_of_the_model(tmp_path: Path) -> None:
    model = make_net().eval()
    model.norm.weight.requires_grad_(False)
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    fit(model, make_inputs(1), output=tmp_path / "d.sd", loss=square_loss)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_every_step_is_reported(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    config = FitConfig(lr=1.0, warmup=0.25, max_steps=8)
    result = fit(
        make_net(),
        make_inputs(3),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=config,
        on_step=reports.append,
    )
    assert [report.step for report in reports] == list(range(1, 9))
    assert tuple(report.loss for report in reports) == result.losses
    rates = [report.lr for report in reports]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert all(report.grad_norm is not None and report.grad_norm > 0 for report in reports)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, bert_folder: Path) -> None:
    deltas = []
    for name, checkpointing in (("a", False), ("b", True)):
        result = fit(
            bert_folder,
            bert_batches(2),
            output=tmp_path / f"{name}.sd",
            save_target=tmp_path / name,
            config=FitConfig(gradient_checkpointing=checkpointing, lr=1e-2),
        )
        deltas.append((result.losses, (tmp_path / name / "model.safetensors").read_bytes()))
    assert deltas[0] == deltas[1]


def test_mixed_precision_trains_fp32_weights(tmp_path: Path) -> None:
    seen = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        seen.append(out.dtype)
        return out.float().square().mean()

    model, before = make_net(), snapshot(make_net())
    config = FitConfig(mixed_precision="bf16", lr=1e-2)
    fit(model, make_inputs(2), output=tmp_path / "d.sd", loss=loss, config=config)
    assert set(seen) == {torch.bfloat16}
    assert model.first.weight.dtype == torch.float32
    assert not same_bits(before["first.weight"], model.first.weight)
    # The process-wide state of accelerate is restored after the run.
    fit(make_net(), make_inputs(2), output=tmp_path / "e.sd", loss=square_loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_no_step_waits(tmp_path: Path) -> None:
    """From the third step to the next reading of losses, checked by CUDA's sync debug mode."""
    n_losses = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal n_losses
        n_losses += 1
        if n_losses == config.selection_batches + 3:
            torch.cuda.set_sync_debug_mode("error")
        if n_losses == config.selection_batches + 12:
            torch.cuda.set_sync_debug_mode("default")
        return square_loss(model, batch)

    config = FitConfig(max_steps=13, log_every=12)
    try:
        fit(make_net(), make_inputs(13), output=tmp_path / "d.sd", loss=loss, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert n_losses == config.selection_batches + 13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_every_precision_trains(tmp_path: Path, precision: str) -> None:
    model, before = make_net(), snapshot(make_net())
    config = FitConfig(mixed_precision=precision, lr=1e-2, epochs=20)
    result = fit(model, make_inputs(1), output=tmp_path / "d.sd", loss=square_loss, config=config)
    assert result.losses[-1] < result.losses[0]
    assert not same_bits(before["first.weight"], model.first.weight.cpu())


def test_save_target_replaces_only_with_overwrite(tmp_path: Path, bert_folder: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "mine").write_text("mine")
    places: dict[str, Any] = {"output": tmp_path / "d.sd", "save_target": tmp_path / "trained"}
    with pytest.raises(FileExistsError, match="trained"):
        fit(bert_folder, bert_batches(1), **places)
    fit(bert_folder, bert_batches(1), **places, overwrite=True)
    assert not (tmp_path / "trained" / "mine").exists()


def test_one_pass_over_an_iterator_is_enough_when_steps_are_given(tmp_path: Path) -> None:
    config = FitConfig(max_steps=4)
    data = iter(make_inputs(4))
    result = fit(make_net(), data, output=tmp_path / "d.sd", loss=square_loss, config=config)
    assert result.n_steps == 4


def test_after_a_loss_that_is_not_finite_the_weights_are_finite(tmp_path: Path) -> None:
    n_losses = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal n_losses
        n_losses += 1
        return square_loss(model, batch) * (torch.inf if n_losses == 4 else 1.0)

    model = make_net()
    config = FitConfig(lr=1e-2, selection="magnitude")
    with pytest.raises(ValueError, match="loss is inf at step 4; lower the learning rate"):
        fit(model, make_inputs(5), output=tmp_path / "d.sd", loss=loss, config=config)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``fit`` read losses as on a GPU: after the step, and not at every step."""
    monkeypatch.setattr(loop, "_log_every", lambda device, config: config.log_every)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_weight_changes_after_a_bad_loss_that_is_found_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, optimizer: str
) -> None:
    """Step 4 of 8 has a bad loss, found after step 6: the weights are those after step 3."""

    def run(n_steps: int, name: str) -> tuple[nn.Module, list[int]]:
        model, told = make_net(), list[int]()
        n_losses = 0

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal n_losses
            n_losses += 1
            return square_loss(model, batch) * (bad if n_losses == 4 else 1.0)

        config = FitConfig(
            max_steps=n_steps, log_every=6, lr=1e-2, weight_decay=0.1, optimizer=optimizer,
            schedule="constant", warmup=0.0, selection="magnitude",
        )  # fmt: skip
        message = f"loss is {bad} at step 4; lower the learning rate"
        with pytest.raises(ValueError, match=message) if n_steps > 3 else nullcontext():
            fit(
                model, make_inputs(9), output=tmp_path / name, loss=loss, config=config,
                run_dir=tmp_path / f"run-{name}", on_step=lambda report: told.append(report.step),
            )  # fmt: skip
        return model, told

    sound, _ = run(3, "sound")
    failed, told = run(8, "failed")
    assert told == [1, 2, 3]
    assert not (tmp_path / "failed").exists()
    for name, value in failed.state_dict().items():
        assert same_bits(value, sound.state_dict()[name]), name


@pytest.mark.usefixtures("as_on_a_gpu")
def test_reading_losses_later_changes_no_result(tmp_path: Path) -> None:
    reports: dict[int, list[StepReport]] = {1: [], 3: []}
    models = {}
    for log_every, told in reports.items():
        model = models[log_every] = make_net()
        config = FitConfig(epochs=2, accumulation=2, lr=1e-2, log_every=log_every, eval_every=4)
        found = fit(
            model,
            make_inputs(9),
            output=tmp_path / f"{log_every}.sd",
            loss=square_loss,
            config=config,
            evaluate=lambda m, told=told: len(told),  # type: ignore[misc] # told of all steps before
            on_step=told.append,
        )
        assert [report.loss for report in told] == list(found.losses)
        assert [(e.step, e.first) for e in found.evaluations] == [(4, 4), (8, 8), (10, 10)]
    assert reports[1] == reports[3]
    for name, value in models[1].state_dict().items():
        assert same_bits(value, models[3].state_dict()[name]), name


@pytest.mark.usefixtures("as_on_a_gpu")
def test_between_readings_no_step_waits(tmp_path: Path) -> None:
    waits = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        waits.append(counted.waits.total())
        return square_loss(model, batch)

    config = FitConfig(
        max_steps=13,
        log_every=6,
        selection="gradient",
        optimizer=lambda groups: torch.optim.AdamW(groups, fused=True),
    )
    with Counted() as counted:
        fit(make_net(), make_inputs(13), output=tmp_path / "d.sd", loss=loss, config=config)
    by_step = waits[config.selection_batches :]
    # The first step shows whether the optimizer is torch's.
    assert by_step[1] == by_step[5]
    assert by_step[6] == by_step[11]


def test_data_that_ends_early_is_logged_and_the_delta_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, before = make_net(), snapshot(make_net())
    result = fit(
        model,
        iter(make_inputs(5)),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(max_steps=10, accumulation=2, lr=1e-2),
        evaluate=lambda m: 0.5,
        run_dir=tmp_path / "run",
    )
    assert (result.stopped, result.n_steps) == ("data", 3)
    assert [evaluation.step for evaluation in result.evaluations] == [3]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    assert "the data ended after 3 of 10 steps; the delta of these steps is written" in caplog.text
    changed = int((before["first.weight"] != model.first.weight).sum())
    assert 0 < changed <= result.nnz
    with sparsedelta.load(result.delta) as delta:
        assert (delta.info["steps"], delta.info["stopped"]) == (3, "data")


@pytest.mark.parametrize("progress", [False, True])
def test_bars_of_transformers_show_only_with_progress(
    tmp_path: Path,
    bert_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool,
) -> None:
    from transformers.utils import logging

    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    bars: Any = logging  # untyped
    was_shown = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        fit(bert_folder, bert_batches(1), output=tmp_path / "d.sd", progress=progress)
        assert bars.is_progress_bar_enabled()
    finally:
        if not was_shown:
            bars.disable_progress_bar()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("Loading weights" in shown.err) == progress
    assert shown.err.startswith(f"loading '{bert_folder}' …\n") == progress
    if not progress:
        assert shown.err == ""


def test_export_from_a_custom_loop(tmp_path: Path) -> None:
    model = make_net()
    with SIFT(model, 0.1, "weight") as sift:
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        sift.attach(optimizer)
        for batch in make_inputs(3):
            optimizer.zero_grad()
            square_loss(model, batch).backward()
            optimizer.step()
        nnz = export_delta(model, tmp_path / "d.sd", sift=sift)
    assert 0 < nnz <= sift.n_trained


def test_a_finished_run_that_resumes_without_a_base_writes_the_same_delta(tmp_path: Path) -> None:
    """No step is done again, so that no optimizer tells SIFT when the weights are written."""
    config = FitConfig(sparse_rate=0.2, max_steps=4, save_every=2, lr=1e-2)

    def run() -> tuple[int, bytes]:
        result = fit(
            make_net(), make_inputs(6), output=tmp_path / "delta.sd", config=config, loss=square_loss,
            run_dir=tmp_path / "run", resume=True, overwrite=True,
        )  # fmt: skip
        return result.nnz, (tmp_path / "delta.sd").read_bytes()

    nnz, delta = run()
    assert nnz
    assert run() == (nnz, delta)


def test_a_finished_run_that_is_started_again_is_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FitConfig(sparse_rate=0.2, max_steps=4, save_every=2)

    def run(output: str, *, resume: bool = True, progress: bool = False) -> None:
        fit(
            make_net(), make_inputs(6), output=output, config=config, loss=square_loss, run_dir="run/", resume=resume,
            progress=progress,
        )  # fmt: skip

    run("d.sd")
    with pytest.raises(FileExistsError, match=r"output 'd.sd' exists, so the run in 'run/' seems"):
        run("d.sd")
    with pytest.raises(
        FileExistsError, match=r"run_dir 'run/' holds a checkpoint .* after step 4; resume that run"
    ):
        run("new.sd", resume=False)
    run("again.sd", progress=True)
    assert Path("again.sd").read_bytes() == Path("d.sd").read_bytes()
    assert capfd.readouterr().err.splitlines()[:3] == [
        "choosing the components …",
        "resuming from 'run/step-00000004' …",
        "writing 'again.sd' …",
    ]
