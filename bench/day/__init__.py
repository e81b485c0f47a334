"""The day a GPU is there: everything that is to be known of it, in parts, with one summary (``make gpu``)."""
