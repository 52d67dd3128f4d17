"""The papers' other methods, one a file, each a router or a way to average for the layers of `poly.py`."""
