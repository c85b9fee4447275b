"""The tasks of KerasHub: preprocessing and generation in the graph."""
