"""Write the test vectors of the channel (CHANNEL.md §11): `python make_channel_vectors.py [--unreleased]`.

The channel, its deltas and its entries are written here without any library for them. An existing vector counts as
released. If its bytes would change, the script stops before it writes anything. `--unreleased` overwrites such vectors,
and removes files that are no longer vectors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from vector_source.checkpoints import Checkpoint, WeightFile, compact, folder, noise, nudged
from vector_source.writer import Coding, assemble, draft

FOLDER = Path(__file__).parent / "channel"
WEIGHTS = "model.safetensors"
HOUR = 3600
BEGIN = 1_790_000_000  # when version 1 was published
OUTSIDE_ID = "org/model@4f1e2d9"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """An entry that must be refused; `edit` makes it from the one of the valid channel."""

    name: str
    breaks: str
    why: str
    version: int
    edit: Callable[[Entry], Entry | bytes]


def weights(step: int, temperature: int) -> Checkpoint:
    """Return the checkpoint after a step of the training; `temperature` is in a side file."""
    tensors = {
        "w": noise("BF16", 40, 1, (5, 8)),
        "b": noise("F32", 6, 2),
        "frozen": noise("I32", 3, 3),
    }
    for number in range(1, step + 1):
        tensors["w"] = nudged(tensors["w"], (number, 3 * number, 39 - number), number)
        tensors["b"] = nudged(tensors["b"], (number % 6,))
    side = {"config.json": b'{"temperature":%d}\n' % temperature, "tokenizer.json": b"[]\n"}
    return folder(WeightFile(WEIGHTS, tensors, {"format": "pt"}), side=side)


TARGETS = {
    1: weights(1, 1),
    2: weights(2, 1),
    3: weights(3, 1),
    4: weights(3, 2),  # only a side file changes
    5: weights(1, 2),  # the training has begun again
    6: weights(2, 2),
    7: weights(4, 2),
}
OUTSIDE = weights(0, 2)
ANCHORS: dict[int, Checkpoint | None] = {1: None, 3: None, 5: None, 6: OUTSIDE}
WITHOUT_DELTA = (1, 5)
RUNS = {1: "first", 5: "second", 6: "third"}
STEPS = {1: None, 2: 2, 3: 3, 4: 3, 5: 1, 6: 2, 7: 4}
INFO: dict[int, dict[str, Any]] = {3: {"loss": 0.25, "ü": ['"', None, {}]}}
GONE = ("deltas/0000000002", "anchors/0000000001")  # segment 1 is pruned


def delta(base: Checkpoint | None, target: Checkpoint, base_id: str | None = None) -> bytes:
    """Return the bytes of a delta; without a base it has all of the target."""
    nothing = Checkpoint([])
    coding = Coding("gaps") if base else Coding("bitmap", "target")
    return assemble(draft(base or nothing, target, default=coding, base_id=base_id))


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of a checkpoint's tensors (FORMAT §14)."""
    records = []
    for (_, name), one in checkpoint.places().items():
        sizes = b"".join(size.to_bytes(8, "little") for size in one.shape)
        records.append(
            len(name).to_bytes(4, "little") + name.encode()
            + bytes([len(one.dtype)]) + one.dtype.encode()
            + len(one.shape).to_bytes(4, "little") + sizes + one.digest()
        )  # fmt: skip
    return blake3(b"sparsedelta fingerprint 2\0" + b"".join(sorted(records))).hexdigest()


def object_of(kind: str, version: int, content: bytes) -> tuple[str, Entry]:
    """Return the name of a delta or anchor, and how an entry names it."""
    digest = blake3(content).hexdigest()
    name = f"{kind}/{version:010}-{digest[:16]}.sd"
    return name, {"digest": digest, "n_bytes": len(content)}


def channel() -> tuple[dict[str, bytes], list[Entry]]:
    """Return the objects of the valid channel by name, and its entries."""
    objects = {"channel.json": compact({"format": "sparsedelta-channel", "format_version": 1})}
    entries: list[Entry] = []
    run, segment = "", 0
    for version, target in TARGETS.items():
        run = RUNS.get(version, run)
        member: dict[str, Entry | None] = {"delta": None, "anchor": None}
        if version not in WITHOUT_DELTA:
            content = delta(TARGETS[version - 1], target)
            name, member["delta"] = object_of("deltas", version, content)
            objects[name] = content
        if version in ANCHORS:
            outside = ANCHORS[version]
            content = delta(outside, target, OUTSIDE_ID if outside else None)
            name, found = object_of("anchors", version, content)
            base = {"id": OUTSIDE_ID, "fingerprint": fingerprint(outside)} if outside else None
            member["anchor"] = found | {"base": base}
            objects[name], segment = content, version
        before = objects[f"versions/{version - 1:010}.json"] if entries else None
        entry = {
            "version": version,
            "previous": blake3(before).hexdigest() if before else None,
            "run": run,
            "time": BEGIN + HOUR * version,
            "step": STEPS[version],
            "target": fingerprint(target),
            "segment": segment,
            **member,
            "info": INFO.get(version, {}),
        }
        objects[f"versions/{version:010}.json"] = compact(entry)
        entries.append(entry)
    objects["head.json"] = compact({"version": 5})  # lags behind
    objects["leases/0000000001/0000000000.json"] = compact({"closed": True})
    lease = {"holder": "a follower", "until": BEGIN + 4 * HOUR}
    objects["leases/0000000003/0000000000.json"] = compact(lease)
    garbage = delta(TARGETS[3], TARGETS[5])  # of a publisher that lost to another
    objects[object_of("deltas", 4, garbage)[0]] = garbage
    objects["notes.txt"] = b"Readers ignore other names.\n"
    kept = {name: raw for name, raw in objects.items() if not name.startswith(GONE)}
    return kept, entries


def put(**members: Any) -> Callable[[Entry], Entry]:
    """Return an edit that replaces members."""
    return lambda entry: entry | members


def reordered(entry: Entry) -> Entry:
    """Return an entry with its last member first."""
    return {"info": entry["info"]} | entry


def without(name: str) -> Callable[[Entry], Entry]:
    """Return an edit that removes a member."""
    return lambda entry: {key: value for key, value in entry.items() if key != name}


def text(old: bytes, new: bytes) -> Callable[[Entry], bytes]:
    """Return an edit of the bytes of an entry."""
    return lambda entry: compact(entry).replace(old, new, 1)


OTHER = "ab" * 32
SOME = {"digest": OTHER, "n_bytes": 100}
BROKEN = [
    Broken("spaces", "C1", "a space between tokens", 7, text(b',"run"', b', "run"')),
    Broken("order", "C1", "`info` is the first member", 7, reordered),
    Broken("no_member", "C1", "`step` is missing", 7, without("step")),
    Broken("more_members", "C1", "a member that version 1 does not have", 7, put(more=1)),
    Broken("member_twice", "C1", "`run` occurs twice", 7, text(b'"run"', b'"run":"a","run"')),
    Broken("no_object", "C1", "a list", 7, lambda entry: compact([entry])),
    Broken("after_the_end", "C1", "a line feed after the object", 7, lambda entry: compact(entry) + b"\n"),
    Broken("empty", "C1", "no byte", 7, lambda entry: b""),
    Broken("run_number", "C1", "`run` is a number", 7, put(run=1)),
    Broken("time_negative", "C1", "`time` is below 0", 7, put(time=-1)),
    Broken("time_fraction", "C1", "`time` is not whole", 7, put(time=1.5)),
    Broken("step_text", "C1", "`step` is a string", 7, put(step="4")),
    Broken("target_short", "C1", "`target` has 31 bytes", 7, put(target="ab" * 31)),
    Broken("target_upper", "C1", "`target` is in upper case", 7, put(target="AB" * 32)),
    Broken("info_list", "C1", "`info` is a list", 7, put(info=[])),
    Broken("info_constant", "C1", "`info` holds NaN", 7, text(b'"info":{', b'"info":{"a":NaN')),
    Broken("delta_digest", "C1", "`delta` has no digest", 7, put(delta={"n_bytes": 100})),
    Broken("anchor_base", "C1", "`anchor` has no base", 6, put(anchor=SOME)),
    Broken("version_other", "C2", "the entry of version 7 says 8", 7, put(version=8)),
    Broken("previous_other", "C3", "`previous` is not the digest of entry 6", 7, put(previous=OTHER)),
    Broken("previous_none", "C3", "`previous` of version 7 is null", 7, put(previous=None)),
    Broken("previous_first", "C3", "`previous` of version 1 is not null", 1, put(previous=OTHER)),
    Broken("segment_own", "C4", "`segment` is 7, and the entry has no anchor", 7, put(segment=7)),
    Broken("segment_before", "C4", "`segment` is 5, version 6 has an anchor", 7, put(segment=5)),
    Broken("segment_later", "C4", "`segment` is 8", 7, put(segment=8)),
    Broken("segment_none", "C4", "`segment` is 0", 7, put(segment=0)),
    Broken("segment_anchor", "C4", "`segment` is 5, and the entry has an anchor", 6, put(segment=5)),
    Broken("nothing", "C5", "`delta` and `anchor` are null", 7, put(delta=None)),
    Broken("first_delta", "C5", "version 1 has a delta", 1, put(delta=SOME)),
]  # fmt: skip


def all_files() -> dict[str, bytes]:
    """Return the content of every file of the vectors by path."""
    objects, entries = channel()
    files = {f"valid/{name}": raw for name, raw in objects.items()}
    manifest: dict[str, Any] = {"base": "base", "versions": [], "invalid": []}
    files |= {f"base/{path}": raw for path, raw in OUTSIDE.files().items()}
    for version, target in TARGETS.items():
        place = f"targets/{version}" if version >= 3 else None
        manifest["versions"].append({"version": version, "target": place})
        if place:
            files |= {f"{place}/{path}": raw for path, raw in target.files().items()}
    for one in BROKEN:
        path = f"invalid/{one.name}.json"
        member = {"name": one.name, "breaks": one.breaks, "why": one.why}
        manifest["invalid"].append(member | {"version": one.version, "entry": path})
        made = one.edit(entries[one.version - 1])
        files[path] = made if isinstance(made, bytes) else compact(made)
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    return files


def main(arguments: list[str]) -> int:
    """Run the script; return its exit status."""
    if arguments not in ([], ["--unreleased"]):
        print(__doc__, file=sys.stderr)
        return 2
    files = all_files()
    existing = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in FOLDER.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }
    outdated = [
        path for path in existing if path != "manifest.json" and existing[path] != files.get(path)
    ]
    if outdated and not arguments:
        print("these exist with other bytes:", *sorted(outdated), sep="\n  ", file=sys.stderr)
        return 1
    for path in outdated:
        (FOLDER / path).unlink()
    for path, content in files.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
