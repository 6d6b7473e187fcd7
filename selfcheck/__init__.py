"""`slimvlm selfcheck`: everything the tool needs of a machine, tried once, on the packaged demo model and no network.

`outcome.py` is what comes out, `run.py` the checks in their order; a check is a function of the `Ground` that returns
what it found as a sentence. An exception in one is its failure, and no other's.
"""
