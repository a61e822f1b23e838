"""The study of quality: which runs it does, how it chooses, its statistics and its tables."""

import copy
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from quality_methods import Method, draw, linear_layers, prepare, rate_of, share_held
from quality_plan import Cell, Row, Setting, best_rate, place_of, plan, rate_at, spec_of
from quality_run import Runner
from quality_tables import (
    by_method,
    curves_table,
    half_width,
    mean_over_sets,
    means_table,
    quality_table,
    rule_table,
    settings_of,
)
from quality_tasks import BATCH, grouped

sys.path.remove(
    str(Path(__file__).parents[2] / "benchmarks")
)  # modules there have the names of test folders

FULL, RANDOM = Method("full"), Method("sift", 2, "random")
SETTING = Setting("tiny", "set")


def row(method: Method, lr: float, seed: int, accuracy: float, **result: Any) -> Row:
    spec = spec_of(Cell(SETTING, method, 0), place_of(lr), seed)
    scores = {"accuracy": accuracy, "loss": 1 - accuracy}
    return {
        "spec": spec,
        "result": {
            "dev": scores,
            "test": scores,
            "train_loss": 0.5,
            "n_trained": 10 if method.name == "sift" else 1000,
            "choose_seconds": 0.1,
            "train_seconds": 2.0,
            "peak_bytes": 2**20,
            **result,
        },
    }


def test_the_series_of_learning_rates() -> None:
    assert [rate_at(place) for place in range(-4, 3)] == [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    assert all(place_of(rate_at(place)) == place for place in range(-20, 5))
    assert rate_at(place_of(0.0028)) == 0.002
    assert rate_at(place_of(0.0036)) == 0.005


def test_the_best_rate_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    rows = [row(FULL, 1e-4, 0, 0.8), row(FULL, 2e-4, 0, 0.9), row(FULL, 5e-4, 0, 0.9)]
    rows[2]["result"]["dev"] = {"accuracy": 0.9, "loss": 0.01}
    assert best_rate(rows) == 5e-4
    rows[2]["result"]["dev"] = {"accuracy": 0.9, "loss": math.nan}
    assert best_rate(rows) == 2e-4


def test_rates_with_fewer_seeds_do_not_win() -> None:
    rows = [row(FULL, 1e-4, 0, 0.8), row(FULL, 1e-4, 1, 0.8), row(FULL, 2e-4, 0, 0.99)]
    assert best_rate(rows) == 1e-4


def study(peak: int, n_seeds: int, rows: list[Row]) -> list[tuple[int, int]]:
    """Do a plan where the accuracy falls with the distance from a place; return the new runs."""
    cell = Cell(SETTING, RANDOM, place_of(1e-3))
    done = []
    for spec in plan([cell], rows, n_seeds):
        if any(each["spec"] == spec for each in rows):
            continue
        place = place_of(spec["lr"])
        rows.append(row(RANDOM, spec["lr"], spec["seed"], 0.9 - 0.01 * abs(place - peak)))
        done.append((place - cell.centre, spec["seed"]))
    return done


def test_a_sweep_has_five_rates_and_seeds_follow_the_best() -> None:
    runs = study(place_of(1e-3) + 1, 3, [])
    assert sorted(runs[:5]) == [(-2, 0), (-1, 0), (0, 0), (1, 0), (2, 0)]
    assert runs[5:] == [(1, 1), (1, 2)]


def test_a_sweep_is_extended_while_its_end_wins() -> None:
    assert study(place_of(1e-3) + 4, 1, [])[5:] == [(3, 0), (4, 0), (5, 0)]
    assert study(place_of(1e-3) - 3, 1, [])[5:] == [(-3, 0), (-4, 0)]
    assert len(study(place_of(1e-3) + 90, 1, [])) == 9


def test_an_interrupted_study_does_only_what_is_missing() -> None:
    rows: list[Row] = []
    whole = study(place_of(1e-3), 3, rows)
    assert study(place_of(1e-3), 3, rows) == []
    assert study(place_of(1e-3), 3, rows[:4]) == whole[4:]


def test_intervals() -> None:
    assert half_width([1.0]) is None
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 * 1 / math.sqrt(3))
    mean, half = mean_over_sets([[1.0, 3.0], [0.0, 0.0]])
    assert mean == 1.0  # of the sets' means 2 and 0
    assert half == pytest.approx(4.303 * math.sqrt(2 / 2) / 2)
    assert mean_over_sets([[1.0, 3.0], [4.0]]) == (3.0, None)


def test_tables_compare_seed_by_seed_at_the_best_rates() -> None:
    rows = [
        *(row(FULL, 1e-4, seed, 0.90 + 0.02 * seed) for seed in (0, 1)),
        *(row(RANDOM, 1e-2, seed, 0.91 + 0.02 * seed, share=0.01) for seed in (0, 1)),
        row(RANDOM, 2e-2, 0, 0.5, share=0.01),
    ]
    (setting,) = settings_of(rows)
    methods = by_method(rows, setting)
    assert list(methods) == [FULL, RANDOM]
    _, _, first, second = quality_table(methods).split("\n")
    assert first.startswith("| full | 1,000 | 0.0001–0.0001, end | 0.0001 |")
    own = "| SIFT random | 10 | 0.01–0.02, end | 0.01 | 1.0e-04 | 92.0 ± 12.7 | +1.0 ± 0.0 | 2 |"
    assert second.startswith(own)
    assert "| SIFT random | 2 | set | 2 | +1.0 ± 0.0 | full, set |" in means_table(rows)
    wider = [*rows, row(RANDOM, 5e-3, 0, 0.5, share=0.01), row(FULL, 5e-5, 0, 0.5)]
    wider.append(row(FULL, 2e-4, 0, 0.5))
    assert "| +1.0 ± 0.0 |  |" in means_table(wider)
    rule = rule_table(rows).split("\n")[2]
    assert rule.split(" | ")[2:] == [
        "1.00", "", "0.0001", "1.0e-02", "0.01", "1.00", "91.0", "91.0", "0.090", "0.090 |"
    ]  # fmt: skip
    curve = curves_table(methods).split("\n")
    assert curve[0] == "| method, rank | 0.0001 | 0.0002 |"
    assert curve[3] == "| SIFT random, 2 | 91.0 · 0.090 · 0.500 | 50.0 · 0.500 · 0.500 |"


def test_batches_hold_each_example_once() -> None:
    rows = [(n, [0] * (n % 13)) for n in range(10 * BATCH + 3)]
    batches = grouped(rows, random.Random(0))
    assert sorted(label for batch in batches for label, _ in batch) == list(range(len(rows)))
    assert max(len(batch) for batch in batches) == BATCH
    assert batches != grouped(rows, random.Random(1))


def test_a_draw_is_proportional_to_the_sums() -> None:
    sums = {str(n): torch.tensor([3.0, 1.0, 0.0]) for n in range(2000)}
    found = draw(sums, 0.1, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cat(list(found.values())), minlength=3)
    assert counts.sum() == 2000
    assert counts[0] == pytest.approx(1500, abs=80)  # 4 standard deviations
    assert counts[2] == 0


def test_the_share_of_the_gradient_held() -> None:
    sums = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([10.0])}
    assert share_held({"a": torch.tensor([1, 3]), "b": torch.tensor([0])}, sums) == 16 / 20
    assert share_held({"a": torch.tensor([1, 3])}, sums) == 6 / 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 12)])
        self.head = nn.Linear(12, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layer:
            inputs = torch.tanh(layer(inputs))
        logits: Tensor = self.head(inputs)
        return logits


class Tiny:
    """Points, labelled by the sign of their sum."""

    n_steps = 12

    def __init__(self) -> None:
        self.targets = [r"re:^layer\.\d\.weight$"]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Net()

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.n_steps):
            yield torch.randn(16, 24, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch), (batch.sum(1) > 0).long())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        batch = next(self.batches(-1))
        return {"accuracy": 1.0, "loss": float(self.loss(model, batch))}


def test_adapters_and_sift_train_equally_many() -> None:
    pytest.importorskip("peft")
    task, rank = Tiny(), 2
    model = task.model(0)
    layers = linear_layers(model, task.targets)
    rate = rate_of(layers, rank)
    lora = prepare(Method("lora", rank), task, task.model(0), 0, {})
    for rule, n_batches in (("random", 0), ("gradient", 2), ("proportional", 2)):
        method = Method("sift", rank, rule, n_batches)
        trained = prepare(method, task, task.model(0), 0, {})
        assert trained.sift is not None
        trained.sift.close()
        assert trained.n_trained == sum(int(rate * p.weight.numel()) + 1 for p in layers.values())
        assert 0 <= trained.n_trained - lora.n_trained <= len(layers)
        assert sum(p.numel() for p in trained.head) == sum(p.numel() for p in lora.head) == 26


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_run_trains_what_the_method_says_and_can_be_repeated() -> None:
    task = Tiny()
    runner = Runner(task)
    untrained = task.evaluate(task.model(0), "test")["loss"]
    for method in (FULL, RANDOM, Method("sift", 2, "gradient", 2)):
        first, again = runner.run(method, 1e-2, 0), runner.run(method, 1e-2, 0)
        assert first["test"]["loss"] < untrained
        assert first["test"] == again["test"]
        assert first["train_loss"] == again["train_loss"]
        assert ("share" in first) == (method.name == "sift")
    assert runner.run(RANDOM, 1e-2, 1)["test"] != runner.run(RANDOM, 1e-2, 0)["test"]


def test_only_the_chosen_components_and_the_head_change() -> None:
    from quality_run import train

    task = Tiny()
    model = task.model(0)
    before = copy.deepcopy(model.state_dict())
    chosen: dict[Any, dict[str, Tensor]] = {}
    trained = prepare(RANDOM, task, model, 0, chosen)
    train(task, model, trained.body, trained.head, 1e-2, 0)
    for name, value in model.state_dict().items():
        changed = value.ne(before[name]).flatten().nonzero().flatten()
        if name.startswith("head"):
            assert len(changed) == value.numel()
        else:
            own = chosen[RANDOM, 0].get(name, torch.empty(0, dtype=torch.long))
            assert changed.tolist() == own.tolist()
