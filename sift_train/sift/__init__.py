"""``SIFT``, in layers: what is trained, the weights, the choice, the steps of optimizers, the public class."""

from __future__ import annotations

from sift_train.sift.sift import SIFT

__all__ = ["SIFT"]
