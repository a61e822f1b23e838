"""Sparse training in your own loop, with three lines more than dense training.

python examples/own_loop.py --data trec.train.txt --output delta.sd
"""

from __future__ import annotations

import itertools
import sys

from labelled_options import options_of

LAYERS = ["query", "key", "value", "attention.output.dense"]
NO_DECAY = ["bias", "LayerNorm.weight"]


def main() -> int:
    """Train, write the delta, and print a summary."""
    options = options_of(__doc__)
    import torch  # after the options, so that --help is fast
    from labelled import accuracy, load, make_batches, model_folder, read_examples, split

    import sift_train

    rows = read_examples(options.data)
    training, held_out = split(rows)
    with model_folder(options.model) as folder:
        model, tokenizer = load(folder, 1 + max(label for label, _ in rows))
    batches, test = make_batches(tokenizer, training), make_batches(tokenizer, held_out)

    sift = sift_train.SIFT(model, sparse_rate=0.05, sparse_module=LAYERS, exception=["classifier"])
    sift.print_trainable_parameters()
    named = list(sift.named_parameters_in_optimizer())
    groups = [
        {"params": [p for n, p in named if not any(d in n for d in NO_DECAY)], "weight_decay": 0.1},
        {"params": [p for n, p in named if any(d in n for d in NO_DECAY)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)

    print(f"accuracy before: {accuracy(model, test):.3f}")
    model.train()
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), options.steps), 1):
        loss = model(**batch).loss
        loss.backward()
        sift.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % 20 == 0:
            print(f"step {number}  loss {float(loss.detach()):.3f}")
    print(f"accuracy after: {accuracy(model, test):.3f}")

    nnz = sift_train.export_delta(model, options.output, sift=sift, overwrite=True)
    print(f"{options.output}: {nnz:,} changed, {options.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
