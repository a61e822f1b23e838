"""Deltas in the forms of other projects: recognised from their content, read, and written."""
