"""The training loss: the loss of the pixels, hard pixels, Dice, the category consistent loss, and their sum."""
