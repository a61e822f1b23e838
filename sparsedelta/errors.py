"""The exceptions of sparsedelta. Every class has a stable ``code``.

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
├─ BaseNeeded (ValueError)         the delta can be decoded only with its base, which was not given
├─ LossyConversion (ValueError)    the other form cannot hold everything, and no loss was allowed
├─ CheckpointError (ValueError)    a base or target cannot be read as a checkpoint
├─ ConflictError (ValueError)      the deltas cannot be stacked, inverted or merged
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
        tensor: name of the tensor concerned; None if the error is not about one tensor.
        expected: the expected value, such as a digest in hex; None if there is none.
        found: the value found; None if there is none.
    """

    code = "error"

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


class BadMagic(FormatError):
    """The file is not a delta."""

    code = "bad_magic"


class UnsupportedVersion(FormatError):
    """The file has a format version that this release does not know."""

    code = "unsupported_version"


class UnsupportedFeature(FormatError):
    """The file names an encoding, dtype or member that this release does not know."""

    code = "unsupported_feature"


class Truncated(FormatError):
    """The file ends too early."""

    code = "truncated"


class Corrupt(FormatError):
    """The file is inconsistent or breaks a rule of the format."""

    code = "corrupt"


class LimitExceeded(FormatError):
    """The file exceeds a limit of the format."""

    code = "limit_exceeded"


class MismatchError(SparseDeltaError, ValueError):
    """The delta does not belong to the checkpoint."""

    code = "mismatch"


class BaseMismatch(MismatchError):
    """A tensor or file of the base differs from the one that the delta was made from."""

    code = "base_mismatch"


class AlreadyApplied(MismatchError):
    """The base already is the target."""

    code = "already_applied"


class PartlyApplied(MismatchError):
    """Some changed tensors are still the base's, others already the target's."""

    code = "partly_applied"


class StructureMismatch(MismatchError):
    """The base has other tensors, dtypes or shapes than the one that the delta was made from."""

    code = "structure_mismatch"


class TargetMismatch(MismatchError):
    """The checkpoint is not the target that the delta describes."""

    code = "target_mismatch"


class BaseNeeded(SparseDeltaError, ValueError):
    """The delta can be decoded only with its base, which was not given."""

    code = "base_needed"


class LossyConversion(SparseDeltaError, ValueError):
    """The form to convert to cannot hold everything, and no loss was allowed."""

    code = "lossy_conversion"


class CheckpointError(SparseDeltaError, ValueError):
    """A base or target cannot be read as a checkpoint, or has a file that no delta can carry."""

    code = "checkpoint"


class ConflictError(SparseDeltaError, ValueError):
    """The deltas cannot be stacked, inverted or merged as requested."""

    code = "conflict"


class ChannelError(SparseDeltaError, ValueError):
    """A channel cannot do what was asked."""

    code = "channel"


class BadVersion(ChannelError):
    """An entry or an object of the channel is damaged or breaks a rule; what the follower holds is as it was."""

    code = "bad_version"


class Uncertain(ChannelError):
    """What the follower holds is not the version that it held last; the next ``sync`` rebuilds it from an anchor."""

    code = "uncertain"


class Behind(ChannelError):
    """The version asked for is not available; what the follower holds is as it was."""

    code = "behind"


class HeadMoved(ChannelError):
    """Another publisher has added a version; this publisher must not add more."""

    code = "head_moved"


class RemoteError(SparseDeltaError):
    """The Hub or another store refused, or could not be reached."""

    code = "remote"


class RemoteNotFound(RemoteError):
    """The repository, revision, file, bucket or object does not exist."""

    code = "remote_not_found"


class AccessDenied(RemoteError):
    """The token lacks permission, or a token is required; or the store can only be read."""

    code = "access_denied"


class RemoteConflict(RemoteError):
    """Another client wrote to the repository or store in the meantime."""

    code = "remote_conflict"


class Unreachable(RemoteError):
    """The Hub or store did not answer, or broke the connection; a later call may succeed."""

    code = "unreachable"
