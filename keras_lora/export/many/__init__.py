"""One SavedModel with an adapter for each row of a request."""
