"""The modules that a Karla repository on the Hub carries; see README.md for the mathematics."""
