"""Downloads the source files of other projects that `make interop` runs, at fixed commits, and checks their SHA-256.

    python benchmarks/fetch_sources.py sources

They are not part of this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = "https://raw.githubusercontent.com"
_TRL, _SLIME, _SKYRL = "huggingface/trl", "THUDM/slime", "NovaSky-AI/SkyRL"
_OF_TRL, _OF_SKYRL = "trl/experimental/async_grpo", "skyrl/backends/skyrl_train/weight_sync"
_V1 = "a46bf262d8ff811c9cda257ca43df6813f1f174a"
_V2 = "019ac735792bb3a56e904d4d086d3bfa13acf8e2"
_SKYRL_COMMIT = "a9564572eb8e91076be43c1bd5e4615e3de17265"


class Source(NamedTuple):
    """A file of another project.

    Attributes:
        place: where it is stored, relative to the folder.
        repository, commit, path: where it comes from.
        sha256: digest of its content.
    """

    place: str
    repository: str
    commit: str
    path: str
    sha256: str


SOURCES = (
    Source("trl_v1/weight_diff.py", _TRL, _V1, f"{_OF_TRL}/weight_diff.py",
           "3c8ccdf12042410a299c32537ccfa5ddd6744c405c0602d6b6ee70f6d925413c"),
    Source("trl_v2/delta_codec.py", _TRL, _V2, f"{_OF_TRL}/delta_codec.py",
           "73d77126adf96a006803a8c0690f57682ad0b03562de8dcde13030045ef4f575"),
    Source("trl_v2/delta_engine.py", _TRL, _V2, f"{_OF_TRL}/delta_engine.py",
           "55860a0f3a3c6604c107a59b6f4a1a03670ddf90c6be04da1f98d642f575d346"),
    Source("trl_v2/weight_diff.py", _TRL, _V2, f"{_OF_TRL}/weight_diff.py",
           "065f6f48ccf756862d56066b796b07fdbc306f91a8d30103f02a75da15bb972e"),
    Source("slime/disk_delta.py", _SLIME, "6b5b07a6ace37f0d9197cd4251df42e7c65c0904", "slime/utils/disk_delta.py",
           "b5503278a7b840a63159778f502dc743d8f603d3213d60051e35a8e720379829"),
    Source("skyrl/delta_checkpoint.py", _SKYRL, _SKYRL_COMMIT, f"{_OF_SKYRL}/delta_checkpoint.py",
           "936b4ebe7631f2983c4b0f1c73f6dedaf12b65734fdfffc82fb5e80947c4b2c1"),
    Source("skyrl/delta_payload.py", _SKYRL, _SKYRL_COMMIT, f"{_OF_SKYRL}/delta_payload.py",
           "511d4d7f80ff90c2ba9b71c5b52a0ca855e820d4fc0d190cd5d3fe74b8e7f109"),
    Source("vllm/checkpoint_weight_patch.py", "vllm-project/vllm", "v0.33.0",
           "vllm/model_executor/model_loader/checkpoint_weight_patch.py",
           "cf431d3576d6662bacd3d0fc189012960fe0017cadff45e8ba62853ad03580f6"),
    Source("grail/sparse_codec.py", "one-covenant/grail", "54d6342928dc516b1169342d801596fe4b88ef6f",
           "grail/infrastructure/sparse_codec.py",
           "f75df144b3e1a79866279eb0b97d2d710dcef1dab02f4baac43a94e1b799450a"),
)  # fmt: skip


def fetch(source: Source, folder: Path, root: str) -> None:
    """Download a file.

    Raises:
        ValueError: its content has another digest; nothing is written.
        OSError: it cannot be downloaded.
    """
    url = f"{root}/{source.repository}/{source.commit}/{source.path}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        content: bytes = answer.read()
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{url} has the SHA-256 {found}, expected {source.sha256}")
    place = folder / source.place
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def main() -> int:
    """Download all files. Return 1 if one is missing or has another content."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to store them")
    parser.add_argument("--root", default=ROOT, help="where the repositories are; default: GitHub")
    arguments = parser.parse_args()
    failures = 0
    for source in SOURCES:
        try:
            fetch(source, arguments.folder, arguments.root)
        except (OSError, ValueError) as error:
            print(f"{source.place}: {error}", file=sys.stderr)
            failures += 1
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
