"""Layer groups of a network, and the param groups they make."""
