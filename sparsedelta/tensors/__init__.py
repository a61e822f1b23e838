"""One tensor at a time: compared, rebuilt, its changes read; threads and bounds of memory."""
