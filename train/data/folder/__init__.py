"""A folder of images and masks, taken for a dataset: its layout, split, classes, recipe, and the report of them."""
