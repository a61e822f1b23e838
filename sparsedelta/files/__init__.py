"""Checkpoints as people have them on disk: weight files, their sets and layout, and side files."""
