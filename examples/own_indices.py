"""Sparse training of components that you choose yourself, in three ways.

python examples/own_indices.py --data trec.train.txt --output delta.sd
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from labelled_options import options_of

if TYPE_CHECKING:
    from torch import Tensor


def small_weights_with_large_gradients(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return scores; a function of a tensor and its gradient can be a rule (``selection=``)."""
    return gradient.abs() / (weight.abs() + 1e-3)


def main() -> int:
    """Choose components, train them and write the delta."""
    options = options_of(__doc__)
    import numpy as np  # after the options, so that --help is fast
    import torch
    from labelled import accuracy, load, make_batches, model_folder, read_examples, split

    import sift_train

    rows = read_examples(options.data)
    training, held_out = split(rows)
    with model_folder(options.model) as folder:
        model, tokenizer = load(folder, 1 + max(label for label, _ in rows))
    batches, test = make_batches(tokenizer, training), make_batches(tokenizer, held_out)

    # 1. Your own rule, applied to the gradients of four batches.
    sift = sift_train.SIFT(
        model,
        sparse_rate=0.02,
        sparse_module=["query", "value"],
        exception=["classifier"],
        selection=small_weights_with_large_gradients,
    )
    with sift.selecting():
        for batch in batches[:4]:
            model(**batch).loss.backward()

    # 2. Your own indices, set after SIFT is created, as in the original SIFT code; here one tensor's
    # largest weights.
    name, p = next(sift.named_trainable_parameters())
    sparse_param = sift.sparse_mapping[name]
    order = torch.flatten(abs(p)).topk(sparse_param.train_num).indices.cpu().numpy()
    sparse_param.idx = np.stack(np.unravel_index(order, p.shape))
    print(f"{name}: {sparse_param.train_num} of {p.numel()} by hand, idx {sparse_param.idx.shape}")

    # 3. All by masks: SIFT(model, selection={"encoder.layer.0....weight": mask, ...}).

    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=5e-4, weight_decay=0.0)
    print(f"accuracy before: {accuracy(model, test):.3f}")
    model.train()
    for batch in itertools.islice(itertools.cycle(batches), options.steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"accuracy after: {accuracy(model, test):.3f}")

    nnz = sift_train.export_delta(model, options.output, sift=sift, overwrite=True)
    print(f"{options.output}: {nnz:,} changed, {options.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
