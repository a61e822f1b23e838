"""An inspection drawn: as text, as a page and as a picture."""
