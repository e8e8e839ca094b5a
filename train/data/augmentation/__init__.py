"""The parts of the augmentation: where a crop lies, which crops are taken, how colours are distorted."""
