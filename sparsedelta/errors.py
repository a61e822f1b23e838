"""The exceptions of sparsedelta. Every class has a stable ``code``, and a ``remedy``: what to do.

SparseDeltaError
├─ FormatError (ValueError)        the file is not a delta that this release can read
│  ├─ BadMagic                     the file is not a delta
│  ├─ UnsupportedVersion           the delta has an unknown format version
│  ├─ UnsupportedFeature           the delta names an unknown encoding, dtype or member
│  ├─ Truncated                    the file ends too early
│  ├─ Corrupt                      the file is inconsistent or breaks a rule of the format
│  └─ LimitExceeded                the file exceeds a limit of the format (FORMAT §11, §14)
├─ MismatchError (ValueError)      the delta does not belong to the checkpoint
│  ├─ BaseMismatch                 a tensor or file of the base has other content
│  ├─ AlreadyApplied               the base already is the target
│  ├─ PartlyApplied                some tensors are the base's, others the target's
│  ├─ StructureMismatch            the base has other tensors, dtypes or shapes
│  └─ TargetMismatch               the checkpoint is not the delta's target
├─ BaseNeeded (ValueError)         this can be done only with the base, which was not given
├─ LossyConversion (ValueError)    the other form cannot hold everything, and no loss was allowed
├─ CheckpointError (ValueError)    a base or target cannot be read as a checkpoint
├─ ConflictError (ValueError)      the deltas cannot be combined as requested
├─ ChannelError (ValueError)       a channel cannot do what was asked
│  ├─ BadVersion                   an entry or object of the channel is damaged or breaks a rule
│  ├─ Uncertain                    what the follower holds is not the version that it held last
│  ├─ Behind                       the version asked for is not available: not published, or pruned
│  └─ HeadMoved                    another publisher has added a version
└─ RemoteError                     the Hub refused, or could not be reached
   ├─ RemoteNotFound               the repository, revision or file does not exist
   ├─ AccessDenied                 the token lacks permission, or a token is required
   ├─ RemoteConflict               another client wrote to the repository in the meantime
   └─ Unreachable                  no answer, a broken connection, too many requests; or offline
"""

from __future__ import annotations


class SparseDeltaError(Exception):
    """The base class of all errors that sparsedelta defines.

    Attributes:
        code: stable name of the kind of error, for programs.
        remedy: what to do about this kind of error; `sparsedelta explain CODE` prints it.
        tensor: name of the tensor concerned; None if the error is not about one tensor.
        expected: the expected value, such as a digest in hex; None if there is none.
        found: the value found; None if there is none.
    """

    code = "error"
    remedy = "Read the message: it names what was found and what to do."

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class FormatError(SparseDeltaError, ValueError):
    """The file is not a delta that this release can read."""

    code = "format"
    remedy = (
        "Check that the path is that of a delta. If it is, read what its more specific code says."
    )


class BadMagic(FormatError):
    """The file is not a delta."""

    code = "bad_magic"
    remedy = (
        "Give the path of a .sd file. A Git LFS pointer must first be fetched with `git lfs"
        " pull`. Files of other projects are read by `sparsedelta convert`."
    )


class UnsupportedVersion(FormatError):
    """The file has a format version that this release does not know."""

    code = "unsupported_version"
    remedy = "Update sparsedelta; the delta was written by a newer release."


class UnsupportedFeature(FormatError):
    """The file names an encoding, dtype or member that this release does not know."""

    code = "unsupported_feature"
    remedy = (
        "Update sparsedelta. If this is the newest release, ask who made the delta what wrote it."
    )


class Truncated(FormatError):
    """The file ends too early."""

    code = "truncated"
    remedy = "Copy or download the file again, and compare its size with that of the original."


class Corrupt(FormatError):
    """The file is inconsistent or breaks a rule of the format."""

    code = "corrupt"
    remedy = (
        "Copy or download the file again. If the error stays, the original is damaged: make"
        " the delta again with `sparsedelta diff`."
    )


class LimitExceeded(FormatError):
    """The file exceeds a limit of the format."""

    code = "limit_exceeded"
    remedy = (
        "Do not trust this file unless you know who made it. If a real target is much "
        "larger than its base and delta, use `apply --any-size`."
    )


class MismatchError(SparseDeltaError, ValueError):
    """The delta does not belong to the checkpoint."""

    code = "mismatch"
    remedy = "Compare the base with the one that `sparsedelta inspect` names."


class BaseMismatch(MismatchError):
    """A tensor or file of the base differs from the one that the delta was made from."""

    code = "base_mismatch"
    remedy = (
        "Use the base that `sparsedelta inspect` names, at exactly that revision. A base "
        "that was converted to another dtype, merged, quantized or saved again may differ. "
        "If only a file such as README.md differs, leave it out with `sparsedelta apply --exclude`."
    )


class AlreadyApplied(MismatchError):
    """The base already is the target."""

    code = "already_applied"
    remedy = (
        "Nothing needs to be done: this checkpoint or model already is the target. To apply"
        " the delta again, start from the base; `revert_` or `invert` leads back to it."
    )


class PartlyApplied(MismatchError):
    """Some changed tensors are still the base's, others already the target's."""

    code = "partly_applied"
    remedy = (
        "A write was broken off, or the files of two checkpoints were mixed. Copy or "
        "download the base again. A model in memory must be loaded again."
    )


class StructureMismatch(MismatchError):
    """The base has other tensors, dtypes or shapes than the one that the delta was made from."""

    code = "structure_mismatch"
    remedy = (
        "Use a base or model of the same architecture, dtype and vocabulary size. For a "
        "model in memory whose names differ, pass `names=`; if the delta adds or reshapes "
        "tensors, use `load_model`."
    )


class TargetMismatch(MismatchError):
    """The checkpoint is not the target that the delta describes."""

    code = "target_mismatch"
    remedy = (
        "This checkpoint was changed after the delta was made, or belongs to another delta."
        " Rebuild it with `sparsedelta apply`, or run `diff` again."
    )


class BaseNeeded(SparseDeltaError, ValueError):
    """The delta can be decoded, inverted or stacked only with its base, which was not given."""

    code = "base_needed"
    remedy = (
        "Pass the base with --base (`base=` in Python), or name its repository to `push` with --base-id. A delta that is made with `diff "
        "--standalone` can be stacked without its base, and inverted if it only changes values."
    )


class LossyConversion(SparseDeltaError, ValueError):
    """The form to convert to cannot hold everything, and no loss was allowed."""

    code = "lossy_conversion"
    remedy = (
        "Choose a form that holds everything (docs/interop.md has a table), or accept the "
        "loss that the message names with --lossy."
    )


class CheckpointError(SparseDeltaError, ValueError):
    """A base or target cannot be read as a checkpoint, or has a file that no delta can carry."""

    code = "checkpoint"
    remedy = (
        "Give a .safetensors file or a folder that holds some, with the index that belongs "
        "to them. Convert .bin, .pt and other files to safetensors first, or make the delta with "
        "`sparsedelta convert`. Leave out a file that is not part of the model with --exclude."
    )


class ConflictError(SparseDeltaError, ValueError):
    """The deltas cannot be stacked, merged, reverted or loaded together as requested."""

    code = "conflict"
    remedy = (
        "Read the message: it says which delta or tensor stands in the way. Stack deltas in the "
        "order in which they were made. Deltas of one base that change the same values can be "
        "combined with `sparsedelta merge`."
    )


class ChannelError(SparseDeltaError, ValueError):
    """A channel cannot do what was asked."""

    code = "channel"
    remedy = "Read the message: it says which version or object of the channel is concerned."


class BadVersion(ChannelError):
    """An entry or an object of the channel is damaged or breaks a rule; what the follower holds is as it was."""

    code = "bad_version"
    remedy = (
        "Publish one version with a new `Publisher(..., anchor_every=1)`: followers then "
        "pass the damaged version."
    )


class Uncertain(ChannelError):
    """What the follower holds is not the version that it held last; the next ``sync`` rebuilds it from an anchor."""

    code = "uncertain"
    remedy = (
        "Call `sync()` again: it compares digests and rebuilds the model from an anchor. "
        "Find out what else writes to the model or folder."
    )


class Behind(ChannelError):
    """The version asked for is not available; what the follower holds is as it was."""

    code = "behind"
    remedy = (
        "Call `sync()` later, or ask for a later version. Keep more versions with `prune --keep`."
    )


class HeadMoved(ChannelError):
    """Another publisher has added a version; this publisher must not add more."""

    code = "head_moved"
    remedy = (
        "Stop one of the two publishers. Then start a new `Publisher`: it continues from "
        "the latest version. If the message names lock.json and no publisher runs, delete "
        "that file."
    )


class RemoteError(SparseDeltaError):
    """The Hub or another store refused, or could not be reached."""

    code = "remote"
    remedy = (
        "Install the package that the message names, if it names one. Otherwise run the command again."
        " If a download is damaged again, remove the file that the message names from the cache."
    )


class RemoteNotFound(RemoteError):
    """The repository, revision, file, bucket or object does not exist."""

    code = "remote_not_found"
    remedy = (
        "Check the spelling of the repository and the revision. A private repository looks "
        "as if it did not exist: log in with `hf auth login`."
    )


class AccessDenied(RemoteError):
    """The token lacks permission, or a token is required; or the store can only be read."""

    code = "access_denied"
    remedy = (
        "Log in with `hf auth login`, accept the licence on the page of a gated repository,"
        " or use a token that may write."
    )


class RemoteConflict(RemoteError):
    """Another client wrote to the repository or store in the meantime."""

    code = "remote_conflict"
    remedy = (
        "Run the command again: it then starts from the new state. If a tag exists, choose "
        "another name."
    )


class Unreachable(RemoteError):
    """The Hub or store did not answer, or broke the connection; a later call may succeed."""

    code = "unreachable"
    remedy = (
        "Check the connection and run the command again; complete files stay in the cache. "
        "With HF_HUB_OFFLINE=1, only files in the cache are used."
    )


def by_code() -> dict[str, type[SparseDeltaError]]:
    """Return the class of each code, in the order of this module."""
    classes = (value for value in globals().values() if isinstance(value, type))
    return {found.code: found for found in classes if issubclass(found, SparseDeltaError)}
