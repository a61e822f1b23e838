"""Deltas on models in memory. The only room of the package that needs torch; it is imported when used."""
