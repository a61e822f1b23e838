"""What a ``.sd`` file is (FORMAT.md): paths, JSON, headers, digests, records, manifest, container, delta."""
