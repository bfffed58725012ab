"""What only makes a CPU faster. Nothing here is needed to understand a model. Each file says which textbook
code it replaces, and a test holds the two equal. Without a C compiler the textbook code runs."""
