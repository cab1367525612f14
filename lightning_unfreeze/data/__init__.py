"""Images from folders, their labels, and loaders that know their place."""
