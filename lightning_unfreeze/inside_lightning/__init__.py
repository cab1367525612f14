"""Every touch of an API of Lightning that is not public, one function each, with the test that guards it."""
