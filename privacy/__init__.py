"""Privacy mechanisms. Today: how users are sampled, which decides what a guarantee may later claim (``samplers``)."""
