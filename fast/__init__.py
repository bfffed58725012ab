"""What only makes a CPU faster. Nothing here is needed to understand a model, and everything works without
it. Each file says which textbook code it replaces, and a test holds the two equal."""
