"""Memory: what is free, what was refused, how it is taken and given back, and models without numbers."""
