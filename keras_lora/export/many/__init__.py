"""One SavedModel for mixed batches: each row of a request names its adapter."""
