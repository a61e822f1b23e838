"""The Trainer's callback and mixin where runs resume, models are rebuilt, or another Trainer is used."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import LAYERS, Rows, SiftTrainer, arguments, load
from torch import nn
from train_helpers import make_bert, same_bits, snapshot
from transformers import Trainer, TrainerCallback

import sparsedelta
from sift_train import (
    SIFT,
    FitConfig,
    PublishCallback,
    SiftCallback,
    SiftConfig,
    SiftTrainerMixin,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_bert(tmp_path / "base", torch.float32)


def with_callback(model: nn.Module, sift: SIFT, folder: Path, **more: Any) -> Trainer:
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **more}
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
    return Trainer(
        model,
        arguments(folder, **given),
        train_dataset=Rows(8),
        eval_dataset=Rows(1),
        optimizers=(optimizer, None),
        callbacks=[SiftCallback(sift)],
    )


def same_model(left: nn.Module, right: nn.Module) -> bool:
    other = right.state_dict()
    return all(same_bits(value, other[name]) for name, value in left.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "selection"), [(torch.bfloat16, "gradient"), (torch.float32, "random")]
)
def test_the_callback_resumes_bit_for_bit(
    tmp_path: Path, base: Path, dtype: torch.dtype, selection: str
) -> None:
    def make() -> tuple[Any, SIFT, Trainer]:
        model = load(base, dtype)
        sift = SIFT(model, 0.1, LAYERS, ["classifier"], selection=selection)
        more = {"gradient_accumulation_steps": 2}
        return model, sift, with_callback(model, sift, tmp_path / "out", **more)

    whole, sift, trainer = make()
    trainer.train()
    resumed, other, trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert same_model(whole, resumed)
    for name, part in sift.sparse_mapping.items():
        assert torch.equal(part.flat_index, other.sparse_mapping[name].flat_index)
        assert torch.equal(part.master, other.sparse_mapping[name].master)


def test_a_moved_checkpoint_needs_its_state(tmp_path: Path, base: Path) -> None:
    model = load(base)
    sift = SIFT(model, 0.1, LAYERS)
    with_callback(model, sift, tmp_path / "out").train()
    shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    resumed = load(base)
    other = SIFT(resumed, 0.1, LAYERS)
    trainer = with_callback(resumed, other, tmp_path / "new")
    with pytest.raises(ValueError, match=r"resumes at step 2, but '.*' has no sift\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
    other.close()
    resumed = load(base)
    other = SIFT(resumed, 0.1, LAYERS)
    other.load(tmp_path / "moved" / "sift.safetensors")
    trainer = with_callback(resumed, other, tmp_path / "new")
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert same_model(model, resumed)


def test_the_best_model_stays_after_close(tmp_path: Path, base: Path) -> None:
    model = load(base)
    sift = SIFT(model, 0.1, LAYERS)
    trainer = with_callback(
        model,
        sift,
        tmp_path / "out",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"step": float(trainer.state.global_step)}
    trainer.train()
    best = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")
    state = load_file(tmp_path / "out" / "checkpoint-1" / "sift.safetensors")
    for name, part in sift.sparse_mapping.items():
        assert torch.equal(state[f"master:{name}"], part.master)
    sift.close()
    assert all(same_bits(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_the_accumulation_of_the_arguments_is_used(tmp_path: Path, base: Path, way: str) -> None:
    chosen = []
    for grad_acc in (1, 2, 4):
        model = load(base)
        sift = SIFT(model, 0.1, LAYERS, grad_acc=grad_acc)
        more: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 4}
        if way == "callback":
            with_callback(model, sift, tmp_path / "out", **more, save_steps=9).train()
        else:
            args = arguments(tmp_path / "out", **more)
            SiftTrainer(model, args, train_dataset=Rows(8), sift=sift).train()
        chosen.append({name: part.flat_index for name, part in sift.sparse_mapping.items()})
    for other in chosen[1:]:
        assert all(torch.equal(index, other[name]) for name, index in chosen[0].items())


def test_the_mixin_builds_the_sift_of_a_config(tmp_path: Path, base: Path) -> None:
    args = arguments(tmp_path / "out", max_steps=3, gradient_accumulation_steps=2)
    given, built = load(base), load(base)
    sift = SIFT(given, 0.1, LAYERS, grad_acc=2)
    SiftTrainer(given, args, train_dataset=Rows(6), sift=sift, base=base).train()
    config = SiftConfig(sparse_rate=0.1, sparse_module=LAYERS)
    trainer = SiftTrainer(built, args, train_dataset=Rows(6), sift=config, base=base)
    trainer.train()
    assert same_model(given, built)
    assert trainer.sift.model is built
    assert trainer.sift.n_trained == sift.n_trained


def test_a_config_and_another_base_are_refused_before_training(tmp_path: Path, base: Path) -> None:
    model = load(base)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    args = arguments(tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match=r"components of 'classifier\.weight' differ"):
        SiftTrainer(model, args, train_dataset=Rows(1), sift=SiftConfig(), base=base)


def without_dropout(folder: Path) -> Any:
    model = load(folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_batches_of_the_train_loader_choose(tmp_path: Path, base: Path) -> None:
    """Every example chooses, as in a loop, and the training then sees the same data as without."""
    config = SiftConfig(sparse_rate=0.1, sparse_module=LAYERS, selection_batches=12)
    args = arguments(
        tmp_path / "out", max_steps=2, learning_rate=0.0, per_device_train_batch_size=1
    )
    trainers = [
        SiftTrainer(without_dropout(base), args, train_dataset=Rows(3), sift=each)
        for each in (config, SiftConfig(sparse_module=LAYERS))
    ]
    for trainer in trainers:
        trainer.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in trainers]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1])
    model = without_dropout(base)
    sift = SIFT(model, 0.1, LAYERS)
    with sift.selecting():
        for at in range(12):
            model(**{key: value[None] for key, value in Rows(3)[at].items()}).loss.backward()
    for name, part in sift.sparse_mapping.items():
        ours = trainers[0].sift.sparse_mapping[name].flat_index
        # The sums have another order, so that one of the last components may be another.
        assert len(set(ours.tolist()) & set(part.flat_index.tolist())) >= len(ours) - 1


def test_a_config_follows_a_model_that_model_init_makes(tmp_path: Path, base: Path) -> None:
    args = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    config = SiftConfig(sparse_rate=0.1, sparse_module=LAYERS)
    trainer = SiftTrainer(
        args=args, model_init=lambda: load(base), train_dataset=Rows(2), sift=config, base=base
    )
    trainer.train()
    assert trainer.sift.model is trainer.model
    sparsedelta.apply(base, tmp_path / "out" / "checkpoint-2" / "delta.sd", tmp_path / "applied")
    rebuilt = load_file(tmp_path / "applied" / "model.safetensors")
    weights = snapshot(trainer.model)
    assert all(same_bits(value, rebuilt[name]) for name, value in weights.items())
    assert any(part.is_trained for part in trainer.sift.sparse_mapping.values())


def test_a_sift_of_another_model_is_refused(tmp_path: Path, base: Path) -> None:
    sift = SIFT(load(base), 0.1, LAYERS)
    args = arguments(tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match="trains another BertForSequenceClassification than"):
        SiftTrainer(load(base), args, train_dataset=Rows(1), sift=sift)
    trainer = with_callback(load(base), sift, tmp_path / "out")
    with pytest.raises(ValueError, match="trains another BertForSequenceClassification than"):
        trainer.train()


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "apollo_adamw"])
def test_optimizers_of_whole_matrices_are_refused(tmp_path: Path, base: Path, optim: str) -> None:
    args = arguments(tmp_path / "out", max_steps=1, optim=optim, optim_target_modules=["query"])
    trainer = SiftTrainer(load(base), args, train_dataset=Rows(1), sift=SiftConfig())
    with pytest.raises(ValueError, match=rf"^optim is '{optim}', which needs the gradients of"):
        trainer.train()


def test_a_trainer_without_the_replaced_methods_is_refused(tmp_path: Path, base: Path) -> None:
    class Other:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    class Mixed(SiftTrainerMixin, Other):
        pass

    with pytest.raises(TypeError, match="has no method create_optimizer"):
        Mixed(load(base), sift=SiftConfig())


class Reporter(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.logs.append(dict(given["logs"]))


@pytest.mark.parametrize("make", [SiftCallback, lambda sift: PublishCallback("channel", sift=sift)])
def test_a_callback_needs_a_sift_that_is_open(base: Path, make: Any) -> None:
    with pytest.raises(TypeError, match="sift is of type SiftConfig, expected a SIFT"):
        make(SiftConfig())
    with SIFT(load(base), 0.1, LAYERS) as sift:
        make(sift)
    with pytest.raises(ValueError, match="the SIFT is closed, so it trains nothing"):
        make(sift)
    with pytest.raises(ValueError, match="the SIFT is closed"):
        SiftTrainer(sift.model, sift=sift)


def test_the_mixin_resumes_only_from_its_own_checkpoints(tmp_path: Path, base: Path) -> None:
    args = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    Trainer(load(base), args, train_dataset=Rows(4)).train()
    ours = SiftTrainer(load(base), args, train_dataset=Rows(4), sift=SiftConfig(), base=base)
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-1' has no sift.safetensors, so no run"
    ):
        ours.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_set_trainer_of_the_original_scripts(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They pass the optimizer to Trainer, then call ``set_trainer``, and dump ``record``."""
    runs = []
    for way in ("set_trainer", "callback"):
        model = load(base)
        sift = SIFT(model, 0.1, LAYERS, exception=None, grad_acc=2)
        optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-2)
        more: dict[str, Any] = {"gradient_accumulation_steps": 2, "logging_steps": 1}
        args = arguments(tmp_path / "out", max_steps=2, **more)
        trainer = Trainer(model, args, train_dataset=Rows(4), optimizers=(optimizer, None))
        reporter = Reporter()
        trainer.add_callback(reporter)
        trainer.args.report_to = ["tensorboard"]
        if way == "set_trainer":
            sift.set_trainer(trainer)
        else:
            trainer.add_callback(SiftCallback(sift))
        trainer.train()
        norms = [logs["grad_norm"] > 0 for logs in reporter.logs if "grad_norm" in logs]
        assert norms == [way == "set_trainer"] * 2  # the other one comes after the reporter
        assert ("tensorboard will show no norm" in caplog.text) == (way == "callback")
        caplog.clear()
        assert all(isinstance(value, float) for value in sift.record.values())
        runs.append(model)
    assert same_model(*runs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mapping", [{}, {r"layer\.1\.": 1e-3}])
def test_the_mixin_with_the_trainer_of_sentence_transformers(
    tmp_path: Path, base: Path, mapping: dict[str, float]
) -> None:
    """Its groups are kept: a rate for each pattern, and the parameters of the loss."""
    pytest.importorskip("sentence_transformers")
    import sentence_transformers as st

    datasets: Any = import_module("datasets")
    losses: Any = import_module("sentence_transformers.losses")

    folder = make_sentence_transformer(tmp_path / "st", base)

    class Both(SiftTrainerMixin, st.SentenceTransformerTrainer):
        pass

    model = st.SentenceTransformer(str(folder), device="cpu")
    loss = losses.SoftmaxLoss(model, 16, 2)
    before = loss.classifier.weight.detach().clone()
    rows = {"a": ["a b", "c d"], "b": ["b", "c"], "label": [1, 0]}
    trainer = Both(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            save_steps=2,
            learning_rate=1e-2,
            learning_rate_mapping=mapping,
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        loss=loss,
        sift=SiftConfig(sparse_rate=0.2),
        base=folder,
    )
    trainer.train()
    assert not torch.equal(before, loss.classifier.weight)
    optimizer: Any = trainer.optimizer
    assert len(optimizer.param_groups) == 2 + len(mapping)
    trained = {name for name, part in trainer.sift.sparse_mapping.items() if part.is_trained}
    assert any("layer.0.attention.self.query" in name for name in trained)
    sparsedelta.apply(folder, tmp_path / "out" / "checkpoint-2" / "delta.sd", tmp_path / "applied")
    applied = st.SentenceTransformer(str(tmp_path / "applied"), device="cpu")
    assert same_model(model, applied)


def make_sentence_transformer(folder: Path, bert: Path) -> Path:
    import sentence_transformers as st
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]
    (folder.parent / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder.parent / "vocab.txt"))
    transformers.BertModel.from_pretrained(bert).save_pretrained(folder.parent / "encoder")
    tokenizer.save_pretrained(folder.parent / "encoder")
    model = st.SentenceTransformer(str(folder.parent / "encoder"), device="cpu")
    model.save_pretrained(str(folder))
    return folder


def test_the_mixin_says_if_a_checkpoint_trains_another_number_of_components(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(n: int, **given: Any) -> None:
        model = load(base)
        args = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
        sift = SIFT(model, selection={"classifier.bias": torch.arange(n)})
        SiftTrainer(model, args, train_dataset=Rows(8), sift=sift).train(**given)

    train(1)
    resumed = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    train(1, **resumed)
    assert "the settings of this run" not in caplog.text
    train(2, **resumed)
    assert "the settings of this run ask for" in caplog.text
    assert "no base is given: the delta starts from" in caplog.text


@pytest.mark.parametrize("kind", ["SIFT", "SiftConfig", "callback"])
def test_a_run_resumes_only_with_its_own_settings(tmp_path: Path, base: Path, kind: str) -> None:
    def train(given: dict[str, Any], **resumed: Any) -> None:
        model = load(base)
        settings: dict[str, Any] = {"sparse_rate": 0.1, "sparse_module": LAYERS, **given}
        if kind == "callback":
            sift = SIFT(model, **settings)
            trainer: Any = with_callback(model, sift, tmp_path / "out", max_steps=2, save_steps=1)
        else:
            args = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
            made = SIFT(model, **settings) if kind == "SIFT" else SiftConfig(**settings)
            trainer = SiftTrainer(model, args, train_dataset=Rows(8), sift=made, base=base)
        trainer.train(**resumed)

    train({})
    resumed = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    differing: list[tuple[dict[str, Any], str]] = [
        ({"seed": 5}, "has seed 0, this one 5; resume with the same settings"),
    ]
    if kind == "SIFT":
        differing.append(
            ({"selection": "magnitude"}, "has selection 'random', this one 'magnitude'")
        )
    if kind == "SiftConfig":
        differing.append(({"selection_batches": 3}, "has selection_batches None, this one 3"))
    for given, message in differing:
        with pytest.raises(ValueError, match=message):
            train(given, **resumed)
    train({"masters_device": "cpu"}, **resumed)
    (tmp_path / "out" / "checkpoint-1" / "sift.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"sift\.safetensors' is not a safetensors file"):
        train({}, **resumed)


def test_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    wrong: Any = FitConfig()
    with pytest.raises(
        TypeError, match="sift is of type FitConfig, expected a SIFT or a SiftConfig"
    ):
        SiftTrainer(nn.Linear(2, 2), arguments(tmp_path), sift=wrong)


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match=r"write class Turned\(SiftTrainerMixin, Trainer\)"):

        class Turned(Trainer, SiftTrainerMixin):  # type: ignore[misc]
            pass


def test_the_mixin_does_not_resume_a_run_with_the_callback(tmp_path: Path, base: Path) -> None:
    model = load(base)
    with SIFT(model, 0.1, LAYERS, ["classifier"]) as sift:
        with_callback(model, sift, tmp_path / "out").train()
    model = load(base)
    args = arguments(tmp_path / "out", max_steps=4)
    trainer = SiftTrainer(
        model, args, train_dataset=Rows(8), sift=SIFT(model, 0.1, LAYERS, ["classifier"])
    )
    with pytest.raises(ValueError, match="has trained_by 'SiftCallback', this one 'SiftTrainerMix"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
