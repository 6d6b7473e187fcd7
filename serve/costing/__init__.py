"""What a compression takes, before it is begun."""
