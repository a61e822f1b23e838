"""What the latest version of a channel holds, and how what is to be published differs from it.

It is read from the manifest of the version's delta or anchor. No weights are read.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from sparsedelta.channel.entry import Entry
from sparsedelta.channel.layout import Kind, object_name
from sparsedelta.channel.versions import STORE_FAILURES, Versions
from sparsedelta.errors import FormatError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.side_files import digest_file
from sparsedelta.format.delta import read_delta
from sparsedelta.format.records import DIGEST_BYTES, Target, TensorSpec
from sparsedelta.ops.counterparts import common_prefix
from sparsedelta.report.text import count

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Latest:
    """What the latest version holds.

    Attributes:
        channel: name of the channel, for messages.
        version: its number.
        target: its files.
        dtypes: names of the dtypes of its tensors, by the names of these.
    """

    channel: str
    version: int
    target: Target
    dtypes: Mapping[str, str]

    def check_kind(self, what: str, *, is_folder: bool, remedy: str) -> None:
        """Check that what is to be published is one file if the version is, and a folder if the version is.

        Args:
            what: is published, for the error.
            is_folder: whether that is a folder.
            remedy: how to publish it as the other kind, for the error.

        Raises:
            ValueError: it is of the other kind.
        """
        if is_folder != self.target.is_folder:
            held, given = (
                ("folders", "one file") if self.target.is_folder else ("single files", "a folder")
            )
            raise ValueError(
                f"the versions of channel '{self.channel}' are {held}, and {what} is {given}; {remedy}, or use a new"
                " channel"
            )

    def has_files_of(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint differs from the version at most in the values of tensors."""
        target, is_folder = self.target, checkpoint.is_folder
        return (
            target.is_folder == is_folder
            and {file.path if is_folder else "": file.digest for file in target.weight_files}
            == {
                file.path if is_folder else "": blake3(file.raw_header).digest()[:DIGEST_BYTES]
                for file in checkpoint.weight_files
            }
            and {file.path: (file.n_bytes, file.digest) for file in target.side_files}
            == {path: digest_file(at) for path, at in checkpoint.side_files.items()}
            and target.empty_folders == checkpoint.empty_folders
        )

    def warn(self, tensors: Mapping[str, TensorSpec]) -> None:
        """Log a warning if most tensors to be published are not in the version by name, and if dtypes differ.

        Args:
            tensors: that are published, by name.
        """
        is_one = len(tensors) == 1
        of_all = f"of {count(len(tensors), 'tensor')} {'is' if is_one else 'are'}"
        of_all_have = f"of {count(len(tensors), 'tensor')} {'has' if is_one else 'have'}"
        new = tensors.keys() - self.dtypes.keys()
        if 2 * len(new) > len(tensors):
            _log.warning(
                "%s %s not in version %d of the channel by name%s",
                count(len(new)), of_all, self.version, self._why_new(new, self.dtypes.keys() - tensors.keys()),
            )  # fmt: skip
        retyped = [
            name for name in tensors.keys() - new if tensors[name].dtype.name != self.dtypes[name]
        ]
        if retyped:
            pairs = Counter((self.dtypes[name], tensors[name].dtype.name) for name in retyped)
            (before, after), _ = pairs.most_common(1)[0]
            n_bytes = sum(tensors[name].n_bytes for name in retyped)
            most = 2 * n_bytes > sum(spec.n_bytes for spec in tensors.values())
            _log.warning(
                "%s %s another dtype than in version %d of the channel (%s instead of %s), so %s; convert the model to %s, or"
                " use a new channel for %s",
                count(len(retyped)), of_all_have, self.version, after, before,
                "the version is stored nearly whole" if most else "these are stored whole", before, after,
            )  # fmt: skip

    @staticmethod
    def _why_new(new: set[str], gone: set[str]) -> str:
        """Return how the names of tensors differ from those that only the version has, and what to do."""
        prefix = common_prefix(new, gone)
        if prefix is None:
            return f", such as {min(new)!r}; publish another model in a channel of its own"
        added, missing = prefix
        if added:
            return (
                f": their names begin with {added!r}; save what is published without its wrapper (torch.compile,"
                " DataParallel)"
            )
        return (
            f": there the names begin with {missing!r}; that version should have been saved without its wrapper"
            " (torch.compile, DataParallel), as this one is"
        )


def read_latest(channel: Versions, head: Entry | None) -> Latest | None:
    """Return what the latest version holds; None if there is none, or it cannot be read.

    Args:
        channel: the channel.
        head: the entry of its latest version.
    """
    if head is None:
        return None
    kind: Kind = "deltas" if head.delta else "anchors"
    found = head.delta or head.anchor
    if found is None:
        return None
    name = object_name(kind, head.version, found)
    try:
        source = channel.store.open(name)
        if source is None:
            return None
        with read_delta(source) as delta:
            dtypes = {row.name: row.target.dtype.name for row in delta.tensors}
            return Latest(channel.store.name, head.version, delta.target, dtypes)
    except (*STORE_FAILURES, FormatError) as error:  # a follower finds out and says so
        _log.info("%s was not read: %s", name, error)
        return None
