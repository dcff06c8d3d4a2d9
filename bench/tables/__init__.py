"""The tables of the READMEs, rendered from the CSVs."""
