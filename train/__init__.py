"""Training, evaluating and using CCNet: commands such as `ccgpu train cityscapes`, and their modules."""
