"""CCNet training: one module a command, for example `python -m train.cityscapes`."""
