"""Codecs: numpy arrays to bytes and back. They do not touch files."""
