"""Instruction tuning: only answers are learnt, in all formats, packings and kinds of loss."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from causal_helpers import CHAT, RECIPES, make_causal, make_tokenizer, run_script
from train_helpers import same_bits, snapshot

import sparsedelta

pytest.importorskip("trl", reason="needs the group recipes")
sys.path.append(str(RECIPES))

import causal_loss

from sift_train import instructions
from sift_train.instructions import IGNORED, Message, Steps, Tokens

NAMES = ["Ada", "Grace", "Emmy", "Mary", "Rosa", "Lise"]
TASKS = [
    {"instruction": "Greet the person.", "input": name, "output": f"Good morning, {name}!"}
    for name in NAMES * 4
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer([f"{task['input']} {task['output']}" for task in TASKS])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model, and the same tasks in three formats."""
    folder = tmp_path_factory.mktemp("instruct")
    make_causal(folder / "model", tokenizer)
    (folder / "alpaca.json").write_text(json.dumps(TASKS))
    write_lines(folder / "chat.jsonl", [{"messages": chat_of(task)} for task in TASKS])
    write_lines(
        folder / "self.jsonl",
        [{"instruction": t["instruction"], "instances": [t], "id": "seed"} for t in TASKS],
    )
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", "utf-8")


def chat_of(task: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{task['instruction']}\n\n{task['input']}"},
        {"role": "assistant", "content": task["output"]},
    ]


def learnt(tokens: Tokens, tokenizer: Any) -> str:
    """Return the text of the labels."""
    text: str = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    return text


def load(folder: Path) -> Any:
    import transformers

    make: Any = transformers.AutoModelForCausalLM
    return make.from_pretrained(folder)


def encode_all(conversations: Any, tokenizer: Any, template: str = "auto") -> list[Tokens]:
    return instructions.encode(conversations, tokenizer, template=template, max_tokens=512)[0]


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    return own


# Formats and labels -----------------------------------------------------------------------------


def test_alpaca_and_self_instruct_are_the_same_tokens(place: Path, tokenizer: Any) -> None:
    files = ("alpaca.json", "self.jsonl")
    one, other = (
        encode_all(instructions.read_conversations(place / name), tokenizer) for name in files
    )
    assert one == other
    assert len(one) == len(TASKS)


def test_chat_is_the_same_from_all_formats(place: Path, chatty: Any) -> None:
    files = ("alpaca.json", "chat.jsonl")
    one, other = (
        encode_all(instructions.read_conversations(place / name), chatty) for name in files
    )
    assert one == other


@pytest.mark.parametrize("given", ["Ada", ""])
def test_alpaca_learns_the_answer_and_its_end(tokenizer: Any, given: str) -> None:
    conversation = (Message("user", "Greet {her}.", given), Message("assistant", "Hello, Ada!"))
    [tokens] = encode_all([conversation], tokenizer)
    assert learnt(tokens, tokenizer) == "Hello, Ada!</s>"
    form = instructions.WITH_INPUT if given else instructions.WITHOUT_INPUT
    prompt = form.replace("{instruction}", "Greet {her}.").replace("{input}", given)
    assert tokenizer.decode(tokens.input_ids) == f"{prompt}Hello, Ada!</s>"
    assert [
        a for a, b in zip(tokens.input_ids, tokens.labels, strict=True) if b not in (a, -100)
    ] == []


def test_chat_learns_every_answer_and_nothing_else(chatty: Any) -> None:
    conversation = (
        Message("system", "Be kind."),
        Message("user", "Hello"),
        Message("assistant", "Good day"),
        Message("user", "And?"),
        Message("assistant", "Good night"),
    )
    [tokens] = encode_all([conversation], chatty)
    assert learnt(tokens, chatty) == "Good day<|end|>\nGood night<|end|>\n"


def test_a_template_that_rewrites_earlier_answers_gives_a_piece_for_each(chatty: Any) -> None:
    chatty.chat_template = CHAT.replace(
        "{{ m.content }}",
        "{{ m.content | upper if m.role == 'assistant' and not loop.last else m.content }}",
    )
    conversation = (
        Message("user", "a"), Message("assistant", "one"),
        Message("user", "b"), Message("assistant", "two"),
    )  # fmt: skip
    first, second = encode_all([conversation], chatty)
    assert learnt(first, chatty) == "one<|end|>\n"
    assert learnt(second, chatty) == "two<|end|>\n"
    assert "ONE" in chatty.decode(second.input_ids)


def test_what_is_cut_off_is_not_learnt_and_empty_examples_are_left_out(tokenizer: Any) -> None:
    pairs = [("Hi", "yes " * 50), ("long " * 400, "no")]
    conversations = [(Message("user", a), Message("assistant", b)) for a, b in pairs]
    kept, n_left_out = instructions.encode(
        conversations, tokenizer, template="alpaca", max_tokens=200
    )
    assert [len(tokens) for tokens in kept] == [200]
    assert n_left_out == 1
    with pytest.raises(ValueError, match="no example has a token of its answer within 20"):
        instructions.encode(conversations, tokenizer, template="alpaca", max_tokens=20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}', r"line 1 of '.*' has the keys prompt; expected messages"),
        ("[1]", "record 1 of '.*' is no JSON object"),
        ('{"instruction": "a", "output": 3}', "output is 3, expected text"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "message of role 'tool'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ("nothing", "line 1 of '.*' is no JSON: Expecting value at column 1; expected a JSON list"),
        (
            '\n{"instruction": "a", "output": "b"}\n{"a": }',
            "line 3 of '.*' is no JSON: .* column 7",
        ),
        ("[1,", "begins as a JSON list but is not one"),
        ('{"instruction": "a", "output": " "}\n' * 2, "all 2 examples of '.*' have empty answers"),
        ("\n", "holds no example"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        instructions.read_conversations(path)


def test_empty_answers_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_lines(path, [{"instruction": "a", "output": text} for text in ("b", "", " ")])
    assert instructions.count_empty(instructions.read_conversations(path)) == 2


def test_keys_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "data.jsonl"
    record = {"instruction": "a", "input": "", "output": "b", "id": 3}
    path.write_text(json.dumps(record))
    instructions.read_conversations(path)
    assert not caplog.records
    path.write_text(json.dumps({**record, "system": "s", "history": []}))
    instructions.read_conversations(path)
    assert "also has 'history', 'system', which the training does not use" in caplog.text


def test_alpaca_takes_no_long_conversation(chatty: Any) -> None:
    conversation = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    with pytest.raises(ValueError, match="goes system, user, assistant, but the Alpaca prompt"):
        encode_all([conversation], chatty, "alpaca")


def test_a_chat_template_that_is_not_there_or_does_not_answer_is_refused(
    tokenizer: Any, chatty: Any
) -> None:
    conversation = (Message("user", "u"), Message("assistant", "a"))
    with pytest.raises(ValueError, match="has no chat template"):
        encode_all([conversation], tokenizer, "chat")
    chatty.chat_template = CHAT.replace("<|assistant|>", "<|other|>")
    with pytest.raises(ValueError, match="does not write an answer right after its prompt"):
        encode_all([conversation], chatty)
    chatty.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(ValueError, match="refuses a conversation: only system messages"):
        encode_all([conversation], chatty)


# Packing, steps and losses ----------------------------------------------------------------------


def some_examples(n: int, seed: int = 0) -> list[Tokens]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        length = int(torch.randint(4, 20, (1,), generator=draw))
        ids = torch.randint(3, 250, (length,), generator=draw).tolist()
        found.append(Tokens(ids, [IGNORED, IGNORED, *ids[2:]]))
    return found


def loss_and_gradient(model: Any, batch: Any, loss: Callable[..., Any]) -> tuple[float, Any]:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return value.item(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_gradient_of_rows_of_one(place: Path, attention: str) -> None:
    model = load(place / "model")
    model.set_attn_implementation(attention)
    causal_loss.check_packing(model, is_flat=False)
    examples = some_examples(7)
    packed = instructions.pack(examples, 40)
    assert sorted(e.input_ids for row in packed for e in row) == sorted(
        e.input_ids for e in examples
    )
    assert len(packed) < 5
    assert max(sum(map(len, row)) for row in packed) <= 40
    n_learnt = torch.tensor(float(sum(e.n_learnt for e in examples)))
    found = []
    for rows, is_packed in (([[e] for e in examples], False), (packed, True)):
        batch = instructions.collate(rows, pad_id=0, is_packed=is_packed)
        found.append(
            loss_and_gradient(model, {**batch, "n_learnt": n_learnt}, instructions.plain_loss)
        )
    (one, gradient), (other, packed_gradient) = found
    assert other == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_a_model_whose_packed_examples_attend_to_each_other_is_refused(tokenizer: Any) -> None:
    import transformers

    make_config: Any = transformers.BloomConfig
    config = make_config(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=4)
    make: Any = transformers.BloomForCausalLM
    with pytest.raises(ValueError, match="would attend to each other in BloomForCausalLM"):
        causal_loss.check_packing(make(config).eval(), is_flat=False)


def test_the_loss_in_chunks_is_the_loss(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_loss, "CHUNK", 16)
    model = load(place / "model")
    causal_loss.check_chunked(model)
    model.lm_head.requires_grad_(False)  # as when training
    rows = [[example] for example in some_examples(6)]
    batch = {
        **instructions.collate(rows, pad_id=0, is_packed=False),
        "n_learnt": torch.tensor(float(sum(row[0].n_learnt for row in rows))),
    }
    one, gradient = loss_and_gradient(model, batch, instructions.plain_loss)
    other, chunked_gradient = loss_and_gradient(model, batch, causal_loss.chunked_loss)
    assert other == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "more"), [("Granite", {"logits_scaling": 8.0}), ("Gemma2", {})])
def test_a_model_that_transforms_its_logits_is_refused(
    tokenizer: Any, kind: str, more: dict[str, float]
) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **more,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with pytest.raises(ValueError, match=f"logits of {kind}ForCausalLM are not just"):
        causal_loss.check_chunked(model)


def test_a_step_is_the_mean_over_its_tokens_for_all_micro_batch_sizes(place: Path) -> None:
    model, rows = load(place / "model"), [[example] for example in some_examples(10)]
    found = []
    for micro_batch in (4, 1):
        torch.manual_seed(0)
        data = Steps(rows, batch=4, micro_batch=micro_batch, pad_id=0, is_packed=False)
        losses = [instructions.plain_loss(model, batch).item() for batch in data]
        assert len(losses) == len(data)
        n = 4 // micro_batch
        windows = [losses[at : at + n] for at in range(0, len(losses), n)]
        found.append([sum(window) / len(window) for window in windows])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 3


# The script -------------------------------------------------------------------------------------


def words_for(place: Path, tmp_path: Path, data: str = "alpaca.json") -> list[object]:
    return [
        "--model", place / "model", "--data", place / data, "--output", tmp_path / "delta.sd",
        "--batch", 8, "--micro-batch", 4, "--lr", 5e-2, "--rate", 0.2, "--epochs", 4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("alpaca.json", ["--packing", "--gradient-checkpointing"]),
        ("self.jsonl", ["--loss", "chunked", "--selection", "magnitude"]),
    ],
)
def test_it_learns_and_its_delta_rebuilds_the_trained_checkpoint(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: str,
    more: list[str],
) -> None:
    words = words_for(place, tmp_path, data)
    kept = ["--save-target", tmp_path / "trained", "--report", tmp_path / "report.json"]
    test = ["--test", place / "alpaca.json", "--eval-every", 3]
    assert run_script("instruct", [*words, *more, *kept, *test], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "activations apart (other: indices and masters):" in shown
    assert shown.index("| sift") < shown.index("24 examples of 24 conversations")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["last_loss"] < 0.7 * report["first_loss"]
    sparsedelta.apply(place / "model", tmp_path / "delta.sd", tmp_path / "rebuilt")
    rebuilt, trained, base = (
        snapshot(load(folder))
        for folder in (tmp_path / "rebuilt", tmp_path / "trained", place / "model")
    )
    assert all(same_bits(rebuilt[name], trained[name]) for name in trained)
    changed = {name for name in base if not same_bits(base[name], trained[name])}
    assert len(changed) == 14  # seven projections in each of two layers
    assert all("proj" in name for name in changed)


def test_a_resumed_run_writes_the_same_delta(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words_for(place, tmp_path), "--steps", 6]
    assert run_script("instruct", words, monkeypatch) == 0
    whole = (tmp_path / "delta.sd").read_bytes()
    from sift_train import loop

    saved = loop.Run._save_if_due

    def save_and_stop(run: Any, *, is_last: bool) -> None:
        saved(run, is_last=is_last)
        if len(run.losses) == 4:
            raise OSError("the power went out")

    words += ["--overwrite", "--run-dir", tmp_path / "run", "--save-every", 2, "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_save_if_due", save_and_stop)
        assert run_script("instruct", words, patch) == "error: the power went out"
    assert run_script("instruct", words, monkeypatch) == 0
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.info["steps"] == 6
    again, first = tmp_path / "again", tmp_path / "first"
    sparsedelta.apply(place / "model", tmp_path / "delta.sd", again)
    (tmp_path / "delta.sd").write_bytes(whole)
    sparsedelta.apply(place / "model", tmp_path / "delta.sd", first)
    name = "model.safetensors"
    assert (again / name).read_bytes() == (first / name).read_bytes()


def test_an_interrupted_run_says_how_to_resume_and_may_replace_only_its_own_output(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sift_train

    fit = sift_train.fit

    def interrupted(*args: Any, on_step: Any, **given: Any) -> Any:
        def step(report: Any) -> None:
            on_step(report)
            if report.step == 2:
                signal.raise_signal(signal.SIGINT)

        return fit(*args, on_step=step, **given)

    target = ["--save-target", tmp_path / "trained"]
    words = [*words_for(place, tmp_path), "--steps", 4, "--run-dir", tmp_path / "run", *target]
    with monkeypatch.context() as patch:
        patch.setattr(sift_train, "fit", interrupted)
        assert run_script("instruct", words, patch) == 130
    assert capsys.readouterr().err.endswith("stopped after step 2 of 4; continue with --resume\n")
    output = tmp_path / "delta.sd"
    left = output.read_bytes()
    output.write_bytes(b"of someone else")
    ended = run_script("instruct", [*words, "--resume"], monkeypatch)
    assert str(ended).startswith(f"error: '{output}' exists")
    output.write_bytes(left)
    assert run_script("instruct", [*words, "--resume"], monkeypatch) == 0
    with sparsedelta.load(output) as delta:
        assert (delta.info["steps"], delta.info["stopped"]) == (4, "done")
    ended = run_script("instruct", [*words, "--resume"], monkeypatch)
    assert str(ended).startswith(f"error: '{output}' exists")


def test_steps_that_take_long_are_shown_at_least_twice_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import instruct

    now = iter(range(0, 10_000, 12))  # seconds
    monkeypatch.setattr(
        instruct,
        "time",
        SimpleNamespace(perf_counter=lambda: next(now), process_time=lambda: 0),
    )
    clock = instruct.Clock()
    for step in range(1, 12):
        clock.on_step(SimpleNamespace(step=step, n_steps=1000, loss=1.0))  # type: ignore[arg-type]
    shown = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert shown == [1, 2, 3, 6, 9]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # from its compiler
def test_fast_switches_on_what_is_available(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The layers are traced and split into forward and backward, but run without generated code,
    # which takes a minute to make.
    compile_one = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: compile_one(self, backend="aot_eager", **kw)
    )
    losses = []
    for more in ([], ["--fast", "--gradient-checkpointing"]):
        words = [*words_for(place, tmp_path), "--steps", 3, "--overwrite", *more]
        report = ["--report", tmp_path / "report.json"]
        assert run_script("instruct", [*words, *report], monkeypatch) == 0
        losses.append(json.loads((tmp_path / "report.json").read_text())["last_loss"])
    assert "2 layers are compiled" in capsys.readouterr().out
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_help_shows_the_plan_of_the_preset_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    config: Any = transformers.LlamaConfig(dtype="bfloat16")  # of the shape of LLaMA-7B
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    words = ["--help", "--preset", "7b", "--model", tmp_path]
    assert run_script("instruct", words, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "(default: 0.0002)" in shown  # of --lr
    assert "12.5" in shown.split("| sift")[1]  # GiB of weights
    assert "fits in 24 GiB" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.json"], "error: --data 'nowhere.json' is not a file"),
        (["--micro-batch", 3], "error: --batch 8 is not a multiple of --micro-batch 3"),
        (
            ["--template", "chat"],
            "error: the tokenizer has no chat template; use the Alpaca prompt",
        ),
        (["--output", "nodir/x.sd"], "error: folder 'nodir' does not exist; create it first"),
        (["--report", "nodir/r.json"], "error: folder 'nodir' does not exist; create it first"),
        (["--save-target", "nodir/t"], "error: folder 'nodir' does not exist; create it first"),
        (
            ["--model", "nolm"],
            "error: 'nolm' is not a folder, and the Hub has no model of that name",
        ),
        (["--resume"], "error: --resume and --save-every need a folder for checkpoints"),
        (["--targets", "qqq"], "error: no linear layer of LlamaForCausalLM has 'qqq' in its name"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[object], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = run_script("instruct", [*words_for(place, tmp_path), *more], monkeypatch)
    assert str(ended).startswith(message)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's own default
def test_trl_trains_on_the_same_and_its_delta_applies(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trl.trainer.sft_trainer import SFTTrainer

    whole = ["--batch", 24, "--steps", 8, "--overwrite", "--warmup", 0]
    report = ["--report", tmp_path / "report.json"]
    words = [*words_for(place, tmp_path), *whole]
    assert run_script("instruct", [*words, *report], monkeypatch) == 0
    ours = json.loads((tmp_path / "report.json").read_text())
    capsys.readouterr()
    models: list[Any] = []
    train = SFTTrainer.train

    def train_and_show(trainer: Any, **given: Any) -> None:
        models.append(trainer.model)
        train(trainer, **given)

    monkeypatch.setattr(SFTTrainer, "train", train_and_show)
    words += ["--packing", "--gradient-checkpointing", "--run-dir", tmp_path / "run"]
    assert run_script("trl_sft", [*words, "--save-every", 4], monkeypatch) == 0
    shown = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in shown.splitlines() if " loss  " in line]
    assert losses[0] == pytest.approx(ours["first_loss"], rel=1e-3)
    assert losses[1] == pytest.approx(ours["last_loss"], rel=0.05)
    sparsedelta.apply(place / "model", tmp_path / "delta.sd", tmp_path / "rebuilt")
    rebuilt, trained = snapshot(load(tmp_path / "rebuilt")), snapshot(models[0])
    assert all(same_bits(rebuilt[name], trained[name]) for name in trained)
    configs = [
        (folder / "config.json").read_text() for folder in (place / "model", tmp_path / "rebuilt")
    ]
    assert configs[0] == configs[1]
    files = sorted(path.name for path in (tmp_path / "run" / "checkpoint-8").iterdir())
    assert "delta.sd" in files
    assert not any(name.startswith("model") for name in files)
    whole_run = (tmp_path / "delta.sd").read_bytes()
    words = [*words, "--save-every", 4]
    ended = run_script("trl_sft", words, monkeypatch)
    assert str(ended).startswith(f"error: '{tmp_path / 'run'}' holds checkpoints of another run")
    ended = run_script("trl_sft", [*words, "--resume", "--steps", 9], monkeypatch)
    assert f"error: the run saved in '{tmp_path / 'run'}' has steps 8, this one 9" in str(ended)
    words = [*words, "--resume"]  # resumed from step 8: no step is left
    assert run_script("trl_sft", words, monkeypatch) == 0
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        again = delta.target_fingerprint
    (tmp_path / "delta.sd").write_bytes(whole_run)
    with sparsedelta.load(tmp_path / "delta.sd") as delta:
        assert delta.target_fingerprint == again
