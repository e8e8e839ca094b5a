"""One step of the optimisation and what it is made of: schedules, optimisers, frozen parts, averaged weights."""
