"""Pages of the docs site that are made from the source when it is built."""
