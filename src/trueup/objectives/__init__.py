"""Pure tensor functions: every formula of the project, each with its source. Torch only."""
