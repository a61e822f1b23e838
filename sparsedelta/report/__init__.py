"""The result of ``inspect`` as text, as an HTML page and as a picture."""
