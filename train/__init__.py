"""Training, evaluating and using CCNet: commands such as `python -m train.cityscapes`, and their modules."""
