"""The feature synchroniser: what a language model or a picture decoder reads again from the pictures before it."""
