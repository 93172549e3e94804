"""The recipes that `sparsekern train` knows by name, as TOML files."""
