"""slimvlm: a vision-language model in, a smaller dense one out."""
