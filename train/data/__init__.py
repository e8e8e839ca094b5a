"""From files to samples: images, label files and videos of a dataset."""
