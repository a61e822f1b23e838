"""The parts of ``merge``: the methods, and the arithmetic with floating-point numbers."""
