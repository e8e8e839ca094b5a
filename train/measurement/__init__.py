"""What context modules and whole networks cost: FLOPs, memory and time, measured or predicted."""
