"""Where bytes are: by range, from a file on disk."""
