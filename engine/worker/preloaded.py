"""Imported last by the process that ranks are forked from: their garbage collections pass over what it has loaded.

So a rank starts sooner, and the memory of torch's modules stays shared among ranks.
"""

import gc

gc.freeze()
