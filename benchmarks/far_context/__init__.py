"""Context modules beside each other on discs whose class stands elsewhere in the image: see `__main__.py`."""
