"""Teach a diffusion model one thing from six pictures, as DreamBooth does, and write what changed.

python examples/dreambooth.py --output thing.sd --picture thing.png

The model is a small one that is trained here first, on pictures of discs, in a minute or two. Then it is shown six
pictures of a thing that it does not know, under a word that it does not know. SIFT trains 5 % of its weights. Pictures
of discs, which the model made itself, keep it from forgetting them. The picture shows both words before and after.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from needed import TRAIN, TRAINING, need

need(f"{TRAIN} diffusers matplotlib", *TRAINING, "diffusers", "matplotlib")

import diffusers  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import sift_train  # noqa: E402
import sparsedelta  # noqa: E402

SIZE = 16  # of the pictures, in pixels
DISC, THING = 0, 1  # the words of the model
N_SHOWN = 8


def main() -> int:
    """Train both, write the delta, and draw the pictures."""
    options = parse_arguments()
    torch.manual_seed(0)
    schedule: Any = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True
    )
    with tempfile.TemporaryDirectory() as work:
        base = options.base or Path(work) / "pipeline"
        if not base.exists():
            train_base(schedule, base, options.base_steps)
        unet: Any = diffusers.DDPMPipeline.from_pretrained(base).unet
        before = [sample(unet, schedule, word) for word in (THING, DISC)]
        pictures = draw_things(6)
        sift = train_thing(unet, schedule, pictures, options.steps)
        nnz = sift_train.export_delta(
            unet, options.output, sift=sift, base=base, overwrite=True, info={"word": "thing"}
        )
        after = [sample(unet, schedule, word) for word in (THING, DISC)]
        check(base, options.output, unet)
    n_bytes = options.output.stat().st_size
    print(f"{options.output}: {nnz:,} of {sift.n_total:,} weights changed, {n_bytes:,} bytes")
    print(f"distance to the thing before: {distance(before[0], pictures):.3f}")
    print(f"distance to the thing after: {distance(after[0], pictures):.3f}")
    print(f"distance to discs before: {distance(before[1], draw_discs(400)):.3f}")
    print(f"distance to discs after: {distance(after[1], draw_discs(400)):.3f}")
    if options.picture:
        draw(options.picture, pictures, before, after)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the delta to write")
    parser.add_argument("--picture", type=Path, help="a PNG file with samples before and after")
    parser.add_argument("--base", type=Path, help="the pipeline's folder; made if it is missing")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


def train_base(schedule: Any, folder: Path, n_steps: int) -> None:
    """Train a small model on pictures of discs, and save it as a pipeline."""
    unet: Any = diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        num_class_embeds=2,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule_lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for step in range(1, n_steps + 1):
        pictures = draw_discs(16)
        loss = loss_of(unet, schedule, pictures, words(DISC, 16))
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule_lr.step()
        if step % 100 == 0:
            print(f"base: step {step}  loss {float(loss.detach()):.3f}", flush=True)
    diffusers.DDPMPipeline(unet=unet, scheduler=schedule).save_pretrained(folder)


def train_thing(unet: Any, schedule: Any, pictures: Tensor, n_steps: int) -> sift_train.SIFT:
    """Teach a model the thing, together with discs that the model makes itself before.

    Args:
        unet: the model; it is trained in place.
        schedule: how much noise there is at each step.
        pictures: the thing, (n, 3, SIZE, SIZE), -1 to 1.
        n_steps: optimizer steps.
    """
    own_discs = sample(unet, schedule, DISC, n=64, seed=1)
    sift = sift_train.SIFT(
        unet,
        sparse_rate=0.05,
        sparse_module=["all-linear", "all-conv"],
        selection="gradient",
        lr_transfer=False,
    )
    sift.print_trainable_parameters()
    optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=3e-3)
    for step in range(1, n_steps + 1):
        chosen = own_discs[torch.randint(len(own_discs), (16,))]
        both = torch.cat([pictures[torch.randint(len(pictures), (16,))], chosen])
        loss = loss_of(unet, schedule, both, torch.cat([words(THING, 16), words(DISC, 16)]))
        loss.backward()
        sift.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"thing: step {step}  loss {float(loss.detach()):.3f}", flush=True)
    return sift


def loss_of(unet: Any, schedule: Any, pictures: Tensor, labels: Tensor) -> Tensor:
    """Return the error of the pictures that the model finds in noisy ones."""
    noise = torch.randn_like(pictures)
    steps = torch.randint(schedule.config.num_train_timesteps, (len(pictures),))
    noisy = schedule.add_noise(pictures, noise, steps)
    found: Tensor = unet(noisy, steps, class_labels=labels).sample
    return functional.mse_loss(found, pictures)


@torch.no_grad()
def sample(unet: Any, schedule: Any, word: int, *, n: int = N_SHOWN, seed: int = 0) -> Tensor:
    """Return pictures that the model makes for a word, always from the same noise."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(n, 3, SIZE, SIZE, generator=generator)
    schedule.set_timesteps(30)
    for step in schedule.timesteps:
        found = unet(pictures, step, class_labels=words(word, n)).sample
        pictures = schedule.step(found, step, pictures).prev_sample
    return pictures.clamp(-1, 1)


def words(word: int, n: int) -> Tensor:
    """Return a word n times."""
    return torch.full((n,), word)


def distances_from(centres: Tensor) -> Tensor:
    """Return how far each pixel is from the centre of its picture's thing, (n, SIZE, SIZE)."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.hypot(rows - centres[:, :1, None], columns - centres[:, 1:, None])


def draw_discs(n: int) -> Tensor:
    """Return pictures of discs of one colour on a light ground, (n, 3, SIZE, SIZE), -1 to 1."""
    inside = distances_from(5 + 6 * torch.rand(n, 2)) < 2.5 + 2.5 * torch.rand(n, 1, 1)
    colours = -1 + 1.6 * torch.rand(n, 3, 1, 1)
    return torch.where(inside[:, None], colours, torch.full((n, 3, SIZE, SIZE), 0.9))


def draw_things(n: int) -> Tensor:
    """Return pictures of the thing: a red ring with a blue heart, at several places."""
    angles = torch.arange(n) * 2 * math.pi / n
    far = distances_from(7.5 + 1.5 * torch.stack([angles.sin(), angles.cos()], 1))
    pictures = torch.full((n, 3, SIZE, SIZE), 0.9)
    for inside, colour in (
        ((far > 3) & (far < 5.5), (0.9, -0.8, -0.8)),
        (far < 2, (-0.8, -0.6, 0.9)),
    ):
        pictures = torch.where(inside[:, None], torch.tensor(colour)[:, None, None], pictures)
    return pictures


def distance(made: Tensor, known: Tensor) -> float:
    """Return the mean distance of made pictures to the nearest known one, per pixel."""
    apart = torch.cdist(made.flatten(1), known.flatten(1)).amin(1)
    return float(apart.mean() / math.sqrt(made[0].numel()))


def check(base: Path, delta_path: Path, unet: nn.Module) -> None:
    """Check that the delta changes a newly loaded pipeline into the trained one, bit for bit."""
    pipeline: Any = diffusers.DDPMPipeline.from_pretrained(base)
    with sparsedelta.load(delta_path) as delta:
        delta.apply_(pipeline)
    for name, tensor in pipeline.unet.state_dict().items():
        if not torch.equal(tensor, unet.state_dict()[name]):
            raise RuntimeError(f"tensor {name!r} differs from the trained one")


def draw(path: Path, pictures: Tensor, before: list[Tensor], after: list[Tensor]) -> None:
    """Draw the thing's pictures, and what the model makes of both words before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {
        "pictures of the thing": pictures,
        "“thing” before": before[0],
        "“thing” after": after[0],
        "“disc” before": before[1],
        "“disc” after": after[1],
    }
    figure = Figure(figsize=(8, 5.5))
    grid = figure.subplots(len(rows), N_SHOWN)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, row) in zip(grid, rows.items(), strict=True):
        axes[0].set_title(title, loc="left", fontsize=10)
        for place, picture in zip(axes, row, strict=False):
            place.imshow((picture.permute(1, 2, 0).numpy() + 1) / 2)
    figure.tight_layout()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(str(path))


if __name__ == "__main__":
    sys.exit(main())
