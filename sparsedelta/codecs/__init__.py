"""Pure codecs: bytes and numpy arrays in and out, no files."""
