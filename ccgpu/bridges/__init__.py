"""Between torch and the kernels: a backend is a module here, with what `ccgpu.dispatch` asks of it (`call.Bridge`)."""
