"""Does each hypothesis find a mode of its own? The experiments of docs/specialisation.md, one command."""
