"""The frozen part of a network: where it ends, what it gives, and where that is kept. torch alone, no Lightning."""
