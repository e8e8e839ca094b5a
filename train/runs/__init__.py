"""A training run: its settings, how it starts or resumes, what it writes and how it ends."""
