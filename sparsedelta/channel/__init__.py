"""Versions of a checkpoint in a store: who publishes them, who follows (spec/CHANNEL.md)."""
