"""Tokens guessed ahead, which the model then checks many at once: proposers, and how many guesses are worth it."""
