"""Training of models that are compiled, as a whole or by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_helpers import make_inputs, make_net, square_loss

from sift_train import SIFT

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about precision and deprecated modules
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_compiled_model_trains_as_a_plain_one(device: str, by_layer: bool) -> None:
    backend = (
        "inductor" if device == "cuda" else "aot_eager"
    )  # on a CPU, inductor runs a C++ compiler
    losses: list[list[float]] = []
    for is_compiled in (False, True):
        model = make_net().to(device)
        run: nn.Module = model
        with SIFT(model, 0.3, ["first.weight", "last"]) as sift:
            optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)
            if is_compiled and by_layer:
                for layer in (model.first, model.last):
                    layer.compile(backend=backend)
            elif is_compiled:
                run = torch.compile(model, backend=backend)  # type: ignore[assignment]
            own = []
            for batch in make_inputs(4):
                loss = square_loss(run, batch.to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                own.append(float(loss))
            losses.append(own)
    plain, compiled = losses
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert len(set(plain)) == len(plain)
