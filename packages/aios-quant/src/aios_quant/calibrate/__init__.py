"""Choosing codes with the help of text: what a layer's inputs look like decides which of its weights matter.

In reading order:

    data            text to windows of tokens; texts of our own come with the package
    hooks           the windows' way through the decoder, layer by layer, and what each Linear is fed
    grid            which numbers a group of weights may become
    rtn             every weight to its nearest neighbour: the baseline, and all that INT8 needs
    awq             columns that see large inputs are scaled up before rounding (arXiv 2306.00978)
    gptq            each column makes up for the errors of those before it (arXiv 2210.17323)
"""
