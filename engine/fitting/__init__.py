"""`efficientclip fit`: from a source of pairs to a model, by the commands that each stage is on its own."""
