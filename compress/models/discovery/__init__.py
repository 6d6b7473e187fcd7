"""What the family table would say of a model that it does not know, found by experiment on single blocks.

No forward of the whole model is needed, so nothing has to be known of its images and prompts: a block of a tower maps
hidden states to hidden states. A block is built with random weights (`blocks`), its linears are disturbed one by one
(`probing`), what depends on what is read as an attention or an MLP (`parts`), and each is proved by cutting it
(`proving`). `discover` makes a row of it, or says what it did not understand.
"""
