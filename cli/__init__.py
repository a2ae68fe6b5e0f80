"""What a person types: the one package that starts processes."""
