"""From files to training samples: images, label maps and videos of a dataset, and the images given to commands."""
