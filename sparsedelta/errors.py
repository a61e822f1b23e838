"""What can go wrong, as one tree. Every error carries a stable ``code``.

SparseDeltaError
├─ FormatError (ValueError)        the file is not a delta this version can read
│  ├─ BadMagic                     not a delta at all
│  ├─ UnsupportedVersion           a delta of another format version
│  ├─ UnsupportedFeature           names an encoding, dtype or member that version 1 does not have
│  ├─ Truncated                    ends too early
│  ├─ Corrupt                      is inconsistent, or breaks a rule of the format
│  └─ LimitExceeded                above a limit of FORMAT §11
├─ MismatchError (ValueError)      delta and checkpoint do not belong together
│  ├─ BaseMismatch                 a tensor or file of the base has other content
│  ├─ AlreadyApplied               the base already is the target
│  ├─ PartlyApplied                some tensors are the base's, others the target's
│  ├─ StructureMismatch            other tensors, dtypes or shapes
│  └─ TargetMismatch               a checkpoint is not the delta's target
├─ BaseNeeded (ValueError)         the delta's changes are coded against its base, not given
├─ CheckpointError (ValueError)    base or target cannot be read as a checkpoint
├─ ConflictError (ValueError)      deltas that cannot be stacked, inverted or merged
├─ ChannelError (ValueError)       a channel cannot do what was asked
│  ├─ BadVersion                   an entry or object of the channel is damaged or breaks a rule
│  ├─ Uncertain                    what the follower holds is not the version that it held last
│  ├─ Behind                       the version asked for is not available: not published, or pruned
│  └─ HeadMoved                    another publisher has added a version
└─ RemoteError                     the Hub said no
   ├─ RemoteNotFound               no such repository, revision or file there
   ├─ AccessDenied                 private, gated, or the token is not good for it
   ├─ RemoteConflict               somebody else wrote there in the meantime
   └─ Unreachable                  no connection, a broken one, too many requests; or offline
"""

from __future__ import annotations


class SparseDeltaError(Exception):
    """Any failure that sparsedelta itself finds.

    Attributes:
        code: stable name of the kind of failure, for programs.
        tensor: name of the tensor concerned, if one is.
        expected: what should have been there, if that can be said.
        found: what was there.
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
    """The file is not a delta that this version can read."""

    code = "format"


class BadMagic(FormatError):
    """The file is not a delta at all."""

    code = "bad_magic"


class UnsupportedVersion(FormatError):
    """The file has a format version that this release does not know."""

    code = "unsupported_version"


class UnsupportedFeature(FormatError):
    """The file names an encoding, dtype or member that its version does not have."""

    code = "unsupported_feature"


class Truncated(FormatError):
    """The file ends too early."""

    code = "truncated"


class Corrupt(FormatError):
    """The file is inconsistent, or breaks a rule of the format."""

    code = "corrupt"


class LimitExceeded(FormatError):
    """The file goes beyond a limit of the format."""

    code = "limit_exceeded"


class MismatchError(SparseDeltaError, ValueError):
    """Delta and checkpoint do not belong together."""

    code = "mismatch"


class BaseMismatch(MismatchError):
    """A tensor or file of the base has other content than the delta was made from."""

    code = "base_mismatch"


class AlreadyApplied(MismatchError):
    """The base already is the target."""

    code = "already_applied"


class PartlyApplied(MismatchError):
    """Some changed tensors are the base's, others already the target's."""

    code = "partly_applied"


class StructureMismatch(MismatchError):
    """The base has other tensors, dtypes or shapes than the delta was made from."""

    code = "structure_mismatch"


class TargetMismatch(MismatchError):
    """A checkpoint is not the target that the delta describes."""

    code = "target_mismatch"


class BaseNeeded(SparseDeltaError, ValueError):
    """The delta's changes are coded against its base, which was not given."""

    code = "base_needed"


class CheckpointError(SparseDeltaError, ValueError):
    """A base or target cannot be read as a checkpoint, or cannot be carried whole."""

    code = "checkpoint"


class ConflictError(SparseDeltaError, ValueError):
    """Deltas that cannot be stacked, inverted or merged as was asked."""

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
    """The Hub refused or could not be reached."""

    code = "remote"


class RemoteNotFound(RemoteError):
    """There is no such repository, revision or file on the Hub."""

    code = "remote_not_found"


class AccessDenied(RemoteError):
    """The Hub does not let this token, or nobody without one, do this."""

    code = "access_denied"


class RemoteConflict(RemoteError):
    """Somebody else wrote to the repository in the meantime."""

    code = "remote_conflict"


class Unreachable(RemoteError):
    """The Hub could not be asked, or not for long enough; a later call may succeed."""

    code = "unreachable"
