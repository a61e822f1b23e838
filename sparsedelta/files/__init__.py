"""Checkpoints on disk: weight files, shards, index files and side files."""
