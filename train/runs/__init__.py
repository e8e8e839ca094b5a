"""Running commands: flags, settings, errors and interrupts; how a training run starts, resumes and what it writes."""
