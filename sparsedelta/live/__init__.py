"""Deltas on models in memory. Only this part of the package imports torch, on first use."""
