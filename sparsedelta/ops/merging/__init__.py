"""The parts of ``merge``: its methods and its floating-point arithmetic, which no other operation uses."""
