"""The callbacks, and what they share (`base`)."""
