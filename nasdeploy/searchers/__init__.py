"""How architectures are searched for: the one-shot loop, and the selection of what ships."""
