"""How the weights of `weft/tiny` were made. Not part of the installed package."""
