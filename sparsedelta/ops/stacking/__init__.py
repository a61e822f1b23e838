"""The parts of ``stack``: combining a chain of deltas, and combining siblings."""
