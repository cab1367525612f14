"""The parts of `TransferClassifier`: its network, its task, what it knows of its data, and its ways out."""
