"""Synthetic images with label maps, drawn from a seed: street scenes and people, for runs without a dataset."""
