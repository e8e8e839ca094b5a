"""The settings that all training commands share: a module for each group of flags, and what follows from them."""
