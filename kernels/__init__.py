"""Criss-cross attention on plain arrays: arrays in, arrays out, no torch."""
