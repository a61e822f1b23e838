"""What ``stack``, ``invert`` and ``merge`` are made of: several deltas, or one backwards, as one."""
