"""Work on one tensor at a time, in bounded memory and several threads: compare it, rebuild it, read its changes."""
