"""What ``merge`` is made of: the recipe, and the one place of the package that computes with floats."""
