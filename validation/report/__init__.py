"""The report over everything recorded: claims, their verdicts, and where predictions and measurements part."""
