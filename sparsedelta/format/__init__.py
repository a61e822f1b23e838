"""The ``.sd`` file format (FORMAT.md): reading, checking and writing every part of the file."""
