"""``Piece``: this rank's span of a vector, for torch.distributed.checkpoint.

The spans may have any length. DTensor, which divides a tensor evenly, has no such spans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sift_train.ranks.shard import Shard


class Piece(Tensor):
    """A span of a vector whose other spans are on other ranks.

    Attributes:
        start: position of the span in the vector.
        total: length of the vector.
        is_written: whether this rank writes the span; a rank with a replica does not.
    """

    start: int
    total: int
    is_written: bool

    @classmethod
    def of(cls, values: Tensor, shard: Shard | None) -> Tensor:
        """Return the span of a part; the vector itself if the part is not sharded.

        All ranks of the shard must call this, in the same order.
        """
        if shard is None:
            return values
        lengths = torch.zeros(shard.n_parts, dtype=torch.int64)
        lengths[shard.number] = len(values)
        shard.sum_(lengths)
        piece = values.as_subclass(cls)
        piece.start = int(lengths[: shard.number].sum())
        piece.total = int(lengths.sum())
        piece.is_written = shard.is_first_copy and len(values) > 0
        return piece

    def __create_write_items__(self, name: str, held: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        if not self.is_written:
            return []
        plain = self.as_subclass(Tensor)
        data = TensorWriteData(
            chunk=self.__create_chunk_list__()[0],
            properties=TensorProperties.create_from_tensor(plain),
            size=torch.Size([self.total]),
        )
        index = MetadataIndex(name, torch.Size([self.start]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        plain = self.as_subclass(Tensor)
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([len(plain)]))]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.as_subclass(Tensor)
