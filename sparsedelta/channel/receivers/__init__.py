"""Ends of a channel for other programs, one a file: engines that receive versions, and trainers that publish them (docs/engines.md)."""
