"""Weight files in formats that this package does not read, and commands that convert them to safetensors."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sparsedelta.errors import FormatError
from sparsedelta.files import junk
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.format.strict_json import parse_json

UNREAD_WEIGHT_SUFFIXES = (
    ".bin", ".ckpt", ".gguf", ".ggml", ".h5", ".mlmodel", ".msgpack", ".npy", ".npz", ".onnx",
    ".onnx_data", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".tflite",
)  # fmt: skip
UNREAD_WEIGHTS = tuple(f"*{suffix}" for suffix in UNREAD_WEIGHT_SUFFIXES)  # globs
DISTRIBUTED_SUFFIX, _METADATA = ".distcp", ".metadata"  # of torch.distributed.checkpoint
ZIP, GGUF = b"PK\x03\x04", b"GGUF"
OLD_PICKLE = b"\x80\x02\x8a\x0a"  # how files begin that torch.save wrote before version 1.6
PICKLED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")  # written by torch.save
CONVERTED_SUFFIXES = (*PICKLED_SUFFIXES, ".gguf", ".onnx")  # ``convert`` makes deltas of such files
SKELETON_SUFFIX = ".skeleton"  # of the side file that ``convert`` makes of what such a file holds beside its tensors
CONFIG = "config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec"

# Names of the weights that transformers and sentence-transformers load from the root of a folder. Names of variants
# have one more part.
_OF_TRANSFORMERS = ("pytorch_model.bin", "pytorch_model-[0-9]*.bin")
_OTHER_WAY = "`sparsedelta convert TARGET delta.sd --base BASE` makes a delta of such files, and rebuilds them from it"
_LOAD = (
    "import torch; from safetensors.torch import save_file; "
    'all = torch.load({source}, "cpu", weights_only=True); '
    "state = next((one for one in (all, *all.values()) if isinstance(one, dict) and any(map(torch.is_tensor, one.values()))), None)"
    ' or exit("it holds no tensors of a model"); '
    "save_file({{name: tensor.contiguous().clone() for name, tensor in state.items() if torch.is_tensor(tensor)}},"
    ' {output}, {{"format": "pt"}})'
)


def stand_in(start: bytes) -> str | None:
    """Return what stands in place of a file that was not downloaded, and what to do, as a clause; None if nothing does.

    Args:
        start: the first bytes of the file, ``START_BYTES`` of ``format.container`` or all.
    """
    if start.startswith(_LFS_POINTER):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if (
        start.removeprefix(b"\xef\xbb\xbf")
        .lstrip()
        .lower()
        .startswith((b"<!doctype html", b"<html"))
    ):
        return (
            "is a web page, not the file itself; download it by the page's link for downloads (on the Hub, 'resolve' in"
            " place of 'blob')"
        )
    return None


def is_distributed(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a checkpoint of torch.distributed, and no safetensors file."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return (
        _METADATA in names
        and any(name.endswith(DISTRIBUTED_SUFFIX) for name in names)
        and not any(name.endswith(WEIGHT_SUFFIX) for name in names)
    )


def conversion(
    source: str,
    paths: Iterable[str],
    read: Callable[[str], bytes | None],
    *,
    revision: str | None = None,
) -> str:
    """Return a clause that says how to convert weights to safetensors, with the command where it is known.

    If there are no weights, the clause says so.

    Args:
        source: a folder, or a repository on the Hub.
        paths: paths of its files.
        read: returns the content of a file; None if it does not exist.
        revision: revision of the repository; None if ``source`` is a folder.
    """
    paths = sorted(path for path in paths if not junk.matches(path, junk.NOT_PART))
    if any(path.endswith(DISTRIBUTED_SUFFIX) for path in paths):
        return (
            "it is a checkpoint of torch.distributed, which only diff, apply, verify and convert read: load it into the"
            " model, and save that as safetensors"
        )
    if not any(path.lower().endswith(UNREAD_WEIGHT_SUFFIXES) for path in paths):
        return "it holds no weights of other formats either; give another path"
    is_converted = revision is None and any(path.endswith(CONVERTED_SUFFIXES) for path in paths)
    other_way = f"{_OTHER_WAY}; or " if is_converted else ""
    return other_way + _to_safetensors(source, paths, read, revision)


def _to_safetensors(
    source: str, paths: Sequence[str], read: Callable[[str], bytes | None], revision: str | None
) -> str:
    pickled = [path for path in paths if path.endswith(PICKLED_SUFFIXES)]
    if not pickled:
        return "convert its weights to safetensors first"
    if any(junk.matches(path, _OF_TRANSFORMERS) and "/" not in path for path in pickled):
        architecture = _architecture(read(CONFIG))
        if architecture:
            return _by_transformers(source, architecture, revision)
    first = pickled[0]
    each = "convert it" if len(pickled) == 1 else "convert each such file"
    return f"{each} with: {_command(_by_torch(source, first, revision))}"


def way_out(start: bytes, location: Path) -> str:
    """Return what to do about a file that is not a safetensors file, as a clause.

    Args:
        start: the first bytes of the file, ``START_BYTES`` or all.
        location: where it is.
    """
    if start.startswith(ZIP) and location.suffix.lower() in PICKLED_SUFFIXES:
        return f"{_OTHER_WAY}; or convert it with: {conversion_of_file(location)}"
    if start.startswith(GGUF) or location.suffix.lower() == ".onnx":
        return _OTHER_WAY
    if start.startswith(OLD_PICKLE):
        return f"an old version of torch.save wrote it; convert it with: {conversion_of_file(location)}"
    if location.name.endswith(".json"):
        return "give the folder that it is in, or a .safetensors file"
    return "give a .safetensors file or a folder that holds some"


def conversion_of_file(location: Path) -> str:
    """Return the command that converts a file written by torch.save to a safetensors file in the same folder."""
    return _command(_by_torch(str(location.parent), location.name, None))


def _architecture(config: bytes | None) -> str | None:
    """Return the name of the model's class in transformers; None if transformers has no class for it."""
    try:
        found = parse_json(config or b"", CONFIG)
    except FormatError:
        return None
    if not isinstance(found, dict) or found.get("auto_map"):  # the model has its own code
        return None
    names = found.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    # The name becomes part of a command, and the file may come from a stranger.
    return name if isinstance(name, str) and name.isidentifier() and name.isascii() else None


def _by_transformers(source: str, architecture: str, revision: str | None) -> str:
    place = source.rstrip("/")
    output = f"{place.rpartition('/')[2] if revision else place}-safetensors"
    options = f", revision={json.dumps(revision)}" if revision else ""
    code = (
        f"from transformers import {architecture} as Model; "
        f'Model.from_pretrained({json.dumps(source)}{options}, dtype="auto")'
        f".save_pretrained({json.dumps(output)})"
    )
    return (
        f"convert it with: {_command(code)} and use {shlex.quote(output)}, with the tokenizer and other files"
        " copied into it"
    )


def _by_torch(folder: str, path: str, revision: str | None) -> str:
    stem = path.rpartition(".")[0]
    if revision is None:
        place = Path(folder)
        source, output = json.dumps(str(place / path)), str(place / stem)
        start = ""
    else:
        options = f"revision={json.dumps(revision)}, allow_patterns={json.dumps(path)}"
        source = f"get({json.dumps(folder)}, {options}) + {json.dumps('/' + path)}"
        output = stem.rpartition("/")[2]
        start = "from huggingface_hub import snapshot_download as get; "
    return start + _LOAD.format(source=source, output=json.dumps(output + WEIGHT_SUFFIX))


def _command(code: str) -> str:
    return f"python -c {shlex.quote(code)}"
