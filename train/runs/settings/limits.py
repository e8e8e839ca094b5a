"""Smallest and largest values of settings.

The largest are far above any use, and below what overflows, fills the memory or starts more processes than a machine
can hold, so that a mistyped number is told before the run begins.
"""

# Smallest side in pixels: two feature positions at output stride 8, because batch norm fails on a single one.
SMALLEST = 16
MOST_ITERATIONS, MOST_BATCH, MOST_FRAMES, MOST_CHANNELS, MOST_LOOPS = 10**9, 2**16, 256, 2**16, 64
MOST_IMAGES = 10**7  # synthetic ones
MOST_WORKERS = 256  # loader processes of one training process
MOST_SEED = 2**63 - 1  # torch takes no larger ones
MOST_KEPT = 2**40  # pixels of a step
MOST_FACTOR = 10**4  # of a learning rate
# AdamW moves each weight by about the learning rate in a step, whatever the gradient.
ADAMW_DIVERGES = 0.01
