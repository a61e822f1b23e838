"""A trainer publishes a version at every step; engines follow and answer requests, each with the version that answered.

python examples/channel_engine.py serve --channel channel/ --port 8001
python examples/channel_engine.py train --channel channel/ --steps 50
curl 'http://127.0.0.1:8001/?prompt=abc'

Start several engines, and end or kill any process at any moment: start it again, and it continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import sparsedelta

TEXT = b"abcdefghijklmnopqrstuvwxyz" * 4
N_NEW = 8


def make_model(seed: int) -> Any:
    """Return a small model of bytes in bf16."""
    import torch  # in functions, so that --help is fast
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def train(channel: sparsedelta.Channel, n_steps: int, saved: Path) -> None:
    """Train from the last saved step, and publish every step."""
    import torch

    model, done = make_model(0), 0
    if saved.exists():
        done, state = torch.load(saved)
        model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.tensor([list(TEXT)])
    with sparsedelta.Publisher(channel, model, anchor_every=20) as publisher:
        for step in range(done + 1, n_steps + 1):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            publisher.publish(step, {"loss": float(loss.detach())})
            if step % 10 == 0:
                torch.save((step, model.state_dict()), saved.with_suffix(".new"))
                saved.with_suffix(".new").replace(saved)
            print(f"step {step}  loss {float(loss.detach()):.3f}", flush=True)


def follow(follower: sparsedelta.Follower, interval: float) -> None:
    """Move the engine's model to each new version, for ever; an engine answers with the version that it has meanwhile."""
    while True:
        try:
            report = follower.sync()
            if report.n_versions:
                print(f"version {report.version}, step {report.step}", flush=True)
        except (OSError, sparsedelta.SparseDeltaError) as error:
            print(f"no new version: {error}", file=sys.stderr, flush=True)
        time.sleep(interval)


def answer(model: Any, follower: sparsedelta.Follower, prompt: str) -> dict[str, Any]:
    """Return the bytes that the model appends to a prompt, and the version that it had all the time."""
    import torch

    tokens = torch.tensor([list(prompt.encode()) or [0]])
    with follower.reading() as version, torch.no_grad():
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=N_NEW,
            do_sample=False,
            pad_token_id=0,
        )
    return {"version": version, "tokens": found[0, tokens.shape[1] :].tolist()}


def serve(channel: sparsedelta.Channel, port: int, interval: float) -> None:
    """Answer requests, and follow the channel in a second thread."""
    model = make_model(1).eval()
    follower = sparsedelta.Follower(channel, model)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            prompt = parse_qs(urlsplit(self.path).query).get("prompt", [""])[0]
            body = json.dumps(answer(model, follower, prompt)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    threading.Thread(target=follow, args=(follower, interval), daemon=True).start()
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"port {server.server_port}", flush=True)
        server.serve_forever()


def main() -> int:
    """Run the trainer or an engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("role", choices=["train", "serve"])
    parser.add_argument("--channel", default="channel/", help="folder or URL of a store")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--saved", type=Path, default=Path("trained.pt"))
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between two looks")
    options = parser.parse_args()
    from needed import TRAIN, need  # beside this file, so only as a program

    need(TRAIN, "torch", "transformers")
    channel = sparsedelta.Channel(options.channel)
    if options.role == "train":
        train(channel, options.steps, options.saved)
    else:
        serve(channel, options.port, options.interval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
