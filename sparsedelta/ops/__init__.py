"""The operations on deltas, one per module: diff, apply, verify, inspect, stack, invert and merge."""
