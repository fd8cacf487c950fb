"""The demo: a small vision-language model that learns to read digits, and everything that it is made of."""
