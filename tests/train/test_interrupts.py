"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint and a sentence that says how to continue."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from train_helpers import make_inputs, make_net, same_bits, square_loss

import sparsedelta
from sift_train import FitConfig, StepReport, fit
from sift_train.publishing import Publishing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_after_the_step_and_save(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_net()

    def interrupt(report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), number)
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)  # a second one has no effect

    before = signal.getsignal(number)
    result = fit(
        model,
        make_inputs(8),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(lr=1e-2),
        run_dir=tmp_path / "run",
        on_step=interrupt,
    )
    assert signal.getsignal(number) is before
    assert (result.stopped, result.n_steps) == ("interrupted", 3)
    assert result.checkpoint == tmp_path / "run" / "step-00000003"
    says = "interrupted after step 3 of 8; to continue, start the same run again and resume it (resume=True, --resume)"
    assert caplog.messages[-1] == says
    assert 0 < result.nnz <= result.n_trained
    with sparsedelta.load(result.delta) as delta:
        assert delta.info["stopped"] == "interrupted"
    continued, whole = make_net(), make_net()
    arguments: dict[str, Any] = {"loss": square_loss, "config": FitConfig(lr=1e-2)}
    fit(
        continued,
        make_inputs(8),
        output=tmp_path / "d.sd",  # which the interrupted run has written
        run_dir=tmp_path / "run",
        resume=True,
        **arguments,
    )
    fit(whole, make_inputs(8), output=tmp_path / "f.sd", **arguments)
    assert all(
        same_bits(p, q) for p, q in zip(continued.parameters(), whole.parameters(), strict=True)
    )


def test_a_handler_of_sigterm_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        result = fit(
            make_net(), make_inputs(2), output=tmp_path / "d.sd", loss=square_loss,
            on_step=lambda report: os.kill(os.getpid(), signal.SIGTERM),
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.stopped, seen) == ("done", [signal.SIGTERM] * 2)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(report: StepReport) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "d.sd"
    with pytest.raises(KeyboardInterrupt):
        fit(make_net(), make_inputs(4), output=output, loss=square_loss, on_step=interrupt)
    assert not output.exists()


def interrupt(*_: Any) -> float:
    os.kill(os.getpid(), signal.SIGINT)
    return 1.0


@pytest.mark.parametrize(("run_dir", "way_out"), [(None, "; give run_dir to get one"), ("run", "")])
def test_a_run_without_a_checkpoint_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, run_dir: str | None, way_out: str
) -> None:
    result = fit(
        make_net(),
        make_inputs(4),
        output=tmp_path / "d.sd",
        loss=square_loss,
        config=FitConfig(eval_before=True),  # before the first step, so that nothing is to be saved
        run_dir=None if run_dir is None else tmp_path / run_dir,
        evaluate=interrupt,
    )
    assert (result.stopped, result.n_steps, result.checkpoint) == ("interrupted", 0, None)
    says = f"interrupted after step 0 of 4; there is no checkpoint to continue from{way_out}"
    assert caplog.messages[-1] == says


def test_a_signal_after_the_checkpoint_of_a_step_ends_the_run_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = Publishing.after

    def publish(self: Publishing, step: int) -> None:
        after(self, step)
        if step == 2:
            interrupt()

    monkeypatch.setattr(Publishing, "after", publish)
    config = FitConfig(publish=tmp_path / "channel")
    result = fit(
        make_net(), make_inputs(6), output=tmp_path / "d.sd", loss=square_loss, config=config,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert (result.stopped, result.n_steps) == ("interrupted", 3)
    assert result.checkpoint == tmp_path / "run" / "step-00000003"
    assert result.checkpoint.is_dir()


def test_the_checkpoint_of_a_result_is_the_newest_that_exists(tmp_path: Path) -> None:
    given: dict[str, Any] = {"output": tmp_path / "d.sd", "loss": square_loss}
    own = {**given, "run_dir": tmp_path / "run"}
    assert fit(make_net(), make_inputs(5), **given).checkpoint is None
    given["overwrite"] = own["overwrite"] = True
    saved = fit(make_net(), make_inputs(5), config=FitConfig(save_every=2), **own).checkpoint
    assert saved == tmp_path / "run" / "step-00000004"
    # Nothing is saved after the last step, so the checkpoint that was resumed stays the newest.
    again = fit(make_net(), make_inputs(5), resume=True, **own)
    assert again.checkpoint == saved
    assert saved.is_dir()
