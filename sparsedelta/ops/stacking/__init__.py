"""What ``stack`` is made of: several deltas as one, one after the other or side by side."""
