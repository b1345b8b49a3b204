"""From a batch to scores and losses: the plain path, and the fast paths that equal it."""
