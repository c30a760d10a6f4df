"""Models from directories, GGUF files and packages."""
