"""Synthetic datasets: street scenes and people, drawn from a seed."""
