"""The backends: each is a module that runs the op on torch tensors, with the six functions of `call.Bridge`."""
